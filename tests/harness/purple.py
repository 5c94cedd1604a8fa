"""A LoRA for a colour that the tiny model has never seen, trained on videos in twenty seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from mochi_core import save_video
from mochi_core.train.__main__ import main as train
from mochi_core.train.tiny.shapes import NEW_COLORS, described_clip, draw
from tests.harness import trained

STEPS = 60


def train_purple(folder: Path) -> list[Path]:
    """Train the LoRA; returns diffusers' file and Genmo's."""
    write_clips(folder / "videos")
    models = ["--vae", str(trained.VAE), "--t5", str(trained.T5)]
    sizes = ["--size", "64x64", "--frames", "7"]
    assert train(["prepare", str(folder / "videos"), *models, *sizes, "-o", str(folder / "dataset")]) == 0
    settings = {
        "transformer": str(trained.TRANSFORMER), "dataset": str(folder / "dataset"), "output": str(folder / "out"),
        "steps": STEPS, "batch_size": 8, "learning_rate": 0.006, "warmup_steps": 6, "dtype": "fp32",
        "caption_dropout": 0.0, "gradient_checkpointing": False,
        "sample": {
            "prompts": ["a purple square rising"], "every": STEPS, "steps": 24, "frames": 13, "size": "64x64",
            "vae": str(trained.VAE), "t5": str(trained.T5),
        },
    }  # fmt: skip
    (folder / "purple.yaml").write_text(yaml.safe_dump(settings))
    assert train(["lora", str(folder / "purple.yaml")]) == 0
    return sorted((folder / "out").glob(f"step_{STEPS:06d}*.safetensors"))


def write_clips(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed in range(24):
        scene, caption = described_clip(np.random.default_rng([3, seed]), [(NEW_COLORS["purple"], "purple")])
        save_video(draw(scene, 7, 64, 64)[None] / np.float32(255), folder / f"{seed}.mp4")
        (folder / f"{seed}.txt").write_text(caption)
