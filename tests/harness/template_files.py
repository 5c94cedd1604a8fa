"""The files that the templates name, from the trained tiny model, and graphs at a size that it was trained for.

`python -m tests.harness.template_files` starts a server that has them all.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from mochi_core import load_transformer, save_video
from mochi_core.train.tiny.shapes import COLORS, Scene, Sprite, draw
from tests.harness import trained
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.quantized_files import scaled_fp8
from tests.harness.server import ComfyServer
from workflows import source

COPIES = {
    f"diffusion_models/{source.BF16}": trained.TRANSFORMER,
    "diffusion_models/fastmochi.safetensors": trained.TRANSFORMER,
    f"text_encoders/{source.T5}": trained.T5,
    f"vae/{source.VAE}": trained.VAE,
    # Where the downloading loader in old workflows put them.
    f"diffusion_models/mochi/{source.BF16}": trained.TRANSFORMER,
    f"vae/mochi/{source.VAE}": trained.VAE,
}
SCALED = {f"diffusion_models/{source.FP8}": trained.TRANSFORMER, f"text_encoders/{source.T5_FP8}": trained.T5}
SIZE = {"width": 64, "height": 64}
GIVEN = "a yellow circle moving to the right"
"""The prompt for the given video."""
STEPS = 32
"""The most that the tiny model needs."""
# Inputs that make every node of the templates fit the tiny model.
TINY: dict[str, dict[str, Any]] = {
    "Mochi1Sampler": {**SIZE, "num_frames": 25},
    "EmptyMochiLatentVideo": {**SIZE, "length": 25},
    "Mochi1Length": {"seconds": 0.8},
    "ImageScale": SIZE,
    "ImageFromBatch": {"length": 25},
    "ContextWindowsManual": {"context_length": 3, "context_overlap": 1},
    "SkipLayerGuidanceDiT": {"double_layers": "4"},
    "LatentUpscale": SIZE,
    "SolidMask": SIZE,
    "MaskComposite": {"x": 32},
    "Mochi1ImageToVideo": {**SIZE, "num_frames": 25},
}


def write_files(base: Path) -> None:
    """Fill models/ and input/ of a server's folder."""
    for name, origin in COPIES.items():
        place(base / "models" / name, lambda path, origin=origin: shutil.copyfile(origin, path))
    for name, origin in SCALED.items():
        tensors = {key: tensor.float() for key, tensor in load_file(origin).items()}
        place(base / "models" / name, lambda path, tensors=tensors: scaled_fp8(tensors, path))
    place(base / "models" / "loras" / "mochi_lora.safetensors", write_lora)
    place(base / "input" / source.YOUR_VIDEO, write_video)
    place(base / "input" / source.YOUR_IMAGE, write_image)
    place(base / "input" / source.YOUR_LAST_IMAGE, write_image)


def place(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def write_lora(path: Path) -> None:
    weights = load_transformer(trained.TRANSFORMER, torch.float32).state_dict()
    write_adapter(path, random_adapter(weights, "qkv_x", "proj_x"), "peft")


def write_video(path: Path) -> None:
    """A yellow circle that moves to the right."""
    sprite = Sprite("circle", COLORS["yellow"], "right", 0.2, (0.0, -0.2), 0.4)
    save_video(draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), 31, 128, 128), path)


def write_image(path: Path) -> None:
    """A green square at the right."""
    sprite = Sprite("square", COLORS["green"], "still", 0.18, (0.05, 0.2), 0.0)
    Image.fromarray(draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), 1, 96, 96)[0]).save(path)


def shrunk(prompt: dict[str, Any], text: str, steps: int = STEPS) -> dict[str, Any]:
    """A template's API form, shrunk, with another prompt and a maximum number of steps; links stay."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {k: v for k, v in TINY.get(node["class_type"], {}).items() if not isinstance(inputs[k], list)}
        if isinstance(inputs.get("steps"), int):
            inputs["steps"] = min(inputs["steps"], steps)
        if node["_meta"]["title"].startswith("Prompt"):
            inputs[next(key for key in ("prompt", "text", "value") if key in inputs)] = text
        elif node["_meta"]["title"] == "Source prompt":
            inputs["prompt"] = GIVEN
    return prompt


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        with ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(folder)) as server:
            print(server.url, flush=True)
            server.process.wait()


if __name__ == "__main__":
    main()
