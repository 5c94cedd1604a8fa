"""The tiny Mochi that comes with the project."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mochi_core import AsymmDiT, MochiPipeline, load_text_encoder, load_transformer, load_vae
from tests.harness.server import ROOT

FOLDER = ROOT / "models"
TRANSFORMER = FOLDER / "diffusion_models" / "mochi_tiny.safetensors"
VAE = FOLDER / "vae" / "mochi_tiny_vae.safetensors"
T5 = FOLDER / "text_encoders" / "t5_tiny.safetensors"
# The standard T5 tokenizer; the file is next to the weights.
TOKENIZER = T5.parent


def install(models_dir: Path) -> None:
    """Copy the files to where a server looks for them."""
    shutil.copytree(FOLDER, models_dir, dirs_exist_ok=True)


def denoiser() -> AsymmDiT:
    return load_transformer(TRANSFORMER, torch.float32)


def pipeline() -> MochiPipeline:
    return MochiPipeline(denoiser(), load_vae(VAE), load_text_encoder(T5))
