"""The trained tiny model, in Python and in a server, and a LoRA trained for it here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mochi_core import MochiPipeline, load_transformer
from tests.harness import trained
from tests.harness.client import ComfyClient
from tests.harness.frames import read_frames
from tests.harness.purple import train_purple


@pytest.fixture(scope="session")
def pipe():
    return trained.pipeline()


@pytest.fixture(scope="session")
def held(pipe):
    """The same model, treated as having a single noise level for all frames, so that given frames are held."""
    dit = load_transformer(trained.TRANSFORMER, frame_levels=False)
    return MochiPipeline(dit.float(), pipe.vae, pipe.text_encoder)


@pytest.fixture(scope="session")
def purple_loras(tmp_path_factory):
    """A LoRA for a colour that the model has never seen, trained on videos: diffusers' file and Genmo's."""
    return train_purple(tmp_path_factory.mktemp("purple"))


@dataclass(frozen=True)
class Comfy:
    client: ComfyClient
    base: Path

    def frames(self, graph: dict[str, Any]) -> np.ndarray:
        """Frames (F, H, W, 3) in [0, 1] of the mp4 that a graph makes."""
        run = self.client.run(graph)
        assert run.outcome == "execution_success", run.error
        return read_frames(self.client.download(run.files[0])) / 255


@pytest.fixture(scope="session")
def comfy(templates_server):
    """A server with the trained models, which the pack itself lists."""
    return Comfy(ComfyClient(templates_server.url), templates_server.base)
