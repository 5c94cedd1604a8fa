"""Fixtures: ComfyUI's folder, and one real server with tiny models for the tests that need it."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Appended: ComfyUI has its own module `nodes`, which our folder of that name must not hide.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]

# Long files first, so that with several processes none is left with one of them at the end.
FOLDERS = ("semantics", "browser", "comfy", "static", "peers", "gpu", "migrate", "core")


def pytest_configure():
    """On SIGTERM, end in order: fixtures stop the servers that they have started."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("told to end", 128 + signal.SIGTERM))


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (FOLDERS.index(item.path.relative_to(ROOT / "tests").parts[0]), item.path not in slow))


def pytest_addoption(parser):
    """`--all` also runs tests that take half an hour: thousands of broken files, hundreds of prompts."""
    parser.addoption("--all", action="store_true", help="also run the tests that take half an hour each")


@pytest.fixture
def with_all(pytestconfig):
    if not pytestconfig.getoption("--all"):
        pytest.skip("takes long; run with --all")


@pytest.fixture(scope="session")
def comfy_path():
    """ComfyUI's folder, prepared by `python dev.py test`."""
    path = os.environ.get("COMFYUI_PATH")
    assert path, "COMFYUI_PATH is not set; run the tests with `python dev.py test`"
    return Path(path)


@pytest.fixture
def float32_products():
    """On a CPU without bf16 units, products of bf16 numbers are computed in float32; elsewhere they are the native ones."""
    from tests.harness import products

    with contextlib.nullcontext() if products.are_native() else products.Float32Products():
        yield


@pytest.fixture
def new_compiler():
    """Reset PyTorch's compiler, so that its limits count only what this test compiles."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def comfy_server(comfy_path, tmp_path_factory):
    """A real server with the pack and tiny models in its own folder."""
    from tests.harness.server import PROBE, QUICK_START, ComfyServer
    from tests.harness.tiny_models import write_models

    base = tmp_path_factory.mktemp("comfyui")
    write_models(base / "models")
    server = ComfyServer(comfy_path, base, QUICK_START, packs=(PROBE,))
    server.environment["MOCHI_DOCTOR"] = "1"  # takes a second; tests/comfy/test_doctor.py
    with server:
        yield server


@pytest.fixture(scope="session")
def templates_server(comfy_path, tmp_path_factory):
    """A server started as users do, with all files that the templates name: the trained tiny models under every name."""
    from tests.harness.server import ComfyServer
    from tests.harness.template_files import write_files

    base = tmp_path_factory.mktemp("templates")
    write_files(base)
    with ComfyServer(comfy_path, base) as server:
        yield server


@pytest.fixture
def comfy_client(comfy_server):
    from tests.harness.client import ComfyClient

    return ComfyClient(comfy_server.url)
