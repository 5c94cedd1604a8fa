"""The device of these tests: a GPU; and the CPU, so that the tests themselves are tested too."""

import pytest
import torch

from tests.harness.devices import DEVICES


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)
