"""Names the right loader, ours or the host's, and its model folder for a file that was given to the wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths

from ...mochi_core.checkpoints.names import others
from ...mochi_core.checkpoints.names.detect import OtherModelError

# What a file holds -> name of the node that loads it, and its folder in models.
LOADERS = {
    "transformer": ("Load Mochi Transformer", "diffusion_models"),
    "vae": ("Load Mochi VAE", "vae"),
    "tiny_vae": ("Load Mochi VAE", "vae"),
    "t5": ("Load Mochi T5", "text_encoders"),
    others.LORA_OF_MOCHI: ("Load Mochi LoRA", "loras"),
}
HOST_LOADERS = {
    others.CHECKPOINT: ("Load Checkpoint", "checkpoints"),
    others.DIFFUSION: ("Load Diffusion Model", "diffusion_models"),
    others.TEXT: ("Load CLIP", "text_encoders"),
    others.VAE: ("Load VAE", "vae"),
    others.PREVIEW: ("Load VAE", "vae_approx"),
    others.VISION: ("Load CLIP Vision", "clip_vision"),
    others.CONTROL: ("Load ControlNet Model", "controlnet"),
    others.UPSCALER: ("Load Upscale Model", "upscale_models"),
    others.LORA_OF_OTHERS: ("Load LoRA", "loras"),
    others.LORA_OF_BOTH: ("Load LoRA (Model and CLIP)", "loras"),
}
WHOLE = "checkpoints"
"""Folder of files that hold several models; all loaders list it."""


@contextmanager
def naming_loaders() -> Iterator[None]:
    """Make errors about a file that holds something else say which loader takes it, and from where."""
    try:
        yield
    except OtherModelError as error:
        raise error.with_loaders(taken_by(error.file, error.content.sorts)) from None


def taken_by(file: str, sorts: tuple[str, ...]) -> str:
    """A clause naming what loads a file with these contents; empty if nothing here does."""
    if sorts == (others.LATENTS,):
        return ", which Load Latent takes from the folder input if its name ends in .latent"
    by_host = Path(file).suffix.lower() in folder_paths.supported_pt_extensions  # not GGUF or indices
    loaders = LOADERS | HOST_LOADERS if by_host else LOADERS
    taken = dict(loaders[sort] for sort in sorts if sort in loaders)
    if len(taken) > 1:
        return f", which {' and '.join(taken)} take from models/{WHOLE}"
    return "".join(f", which {node} takes from models/{folder}" for node, folder in taken.items())
