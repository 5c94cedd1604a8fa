"""Latents as files: VAE space (B, 12, T, H, W), in the format of ComfyUI's SaveLatent and LoadLatent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..autoencoder.latents import latents_problem
from ..checkpoints import from_state_dict, open_checkpoint
from ..checkpoints.formats.writer import write_safetensors

NAME = "latent_tensor"
VERSION_MARK = "latent_format_version_0"
# Files without the marker date from when latents were saved multiplied by Stable Diffusion 1's scale factor.
UNMARKED_SCALE = 0.18215


def save_latents(latents: Tensor, path: str | Path) -> None:
    """Write VAE-space latents (B, 12, T, H, W) from any device.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = from_state_dict({NAME: latents.float().cpu(), VERSION_MARK: torch.tensor([])})
    write_safetensors(Path(path), tensors, {})


def load_latents(path: str | Path) -> Tensor:
    """Read VAE-space latents (B, 12, T, H, W), float32, from a .latent file or a safetensors file with one such tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or latents with an empty dimension or non-finite values.
    """
    file = open_checkpoint(path)
    tensors = file.tensors
    names = [NAME] if NAME in tensors else [name for name, tensor in tensors.items() if len(tensor.shape) in (4, 5)]
    if len(names) != 1:
        raise file.error(f"holds {len(names)} tensors that could be latents; it must hold exactly one.")
    stored = tensors[names[0]]
    shape = (1, *stored.shape) if len(stored.shape) == 4 else stored.shape
    latents = stored.read().reshape(shape)
    if problem := latents_problem(latents):
        raise file.error(f"cannot be decoded: {problem}")
    latents = latents.to(torch.float32, copy=True)  # not a mapping of a file that may soon be overwritten
    unmarked = NAME in tensors and VERSION_MARK not in tensors
    return latents / UNMARKED_SCALE if unmarked else latents
