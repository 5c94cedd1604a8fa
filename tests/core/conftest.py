"""Fixtures of the core's tests."""

import pytest
import torch


@pytest.fixture
def new_compiler():
    """Nothing compiled before counts towards PyTorch's limits, nor what the test compiles towards those of the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
