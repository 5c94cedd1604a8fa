"""Independent implementations of the same model, with the same weights."""

import sys

import pytest
import torch


@pytest.fixture(scope="session")
def comfyui(comfy_path):
    """ComfyUI's own Python modules, on the CPU, in this process."""
    if str(comfy_path) not in sys.path:
        sys.path.insert(0, str(comfy_path))
    from comfy.cli_args import args

    args.cpu = True


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
