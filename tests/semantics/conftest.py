"""The trained tiny model, in Python and in a server, and a LoRA that is trained for it here."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import trained
from tests.harness.client import ComfyClient
from tests.harness.purple import train_purple
from tests.harness.server import PROBE, ComfyServer


@pytest.fixture(scope="session")
def pipe():
    return trained.pipeline()


@pytest.fixture(scope="session")
def purple_loras(tmp_path_factory):
    """A LoRA for a colour that the model has never seen, trained from videos: diffusers' file and Genmo's."""
    return train_purple(tmp_path_factory.mktemp("purple"))


@dataclass(frozen=True)
class Comfy:
    client: ComfyClient
    base: Path


@pytest.fixture(scope="session")
def comfy(comfy_path, tmp_path_factory):
    """A server with the trained models."""
    base = tmp_path_factory.mktemp("comfyui-trained")
    trained.install(base / "models")
    with ComfyServer(comfy_path, base, packs=(PROBE,)) as server:
        yield Comfy(ComfyClient(server.url), base)
