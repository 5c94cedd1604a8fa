"""Train a small denoiser and its text encoder together, on latents of procedural clips."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...autoencoder.latents import normalize_latents
from ...autoencoder.model import AsymmVAE
from ...checkpoints import from_state_dict, open_tensors
from ...checkpoints.formats.writer import write_safetensors
from ...checkpoints.names.t5 import hugging_face_entries
from ...config import AsymmDiTConfig, T5EncoderConfig
from ...transformer.model import AsymmDiT
from ..objective import velocity_loss
from . import vae as tiny_vae
from .shapes import draw, random_clip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CONFIG = AsymmDiTConfig(
    depth=6, hidden_size_x=192, hidden_size_y=96, num_heads=3, text_width=64, mlp_size_x=512, mlp_size_y=256
)
T5_CONFIG = T5EncoderConfig(depth=2, width=64, num_heads=4, head_dim=16, mlp_size=128)
SIZES = ((13, 64, 64), (13, 64, 96), (25, 64, 64))
"""Frames, height and width of the clips."""
SHARES = (0.6, 0.2, 0.2)
BATCH_TOKENS = 3200
CAPTION_DROPOUT = 0.15
# Turns from one patch to the next and from one frame to the next, at the beginning; the grid of 4 x 4 patches is 192 wide.
ANGLES = (0.15, 2.0)
PATCH_DISTANCE = 48


@dataclass(frozen=True)
class Clips:
    """Clips of one size, as a denoiser learns from them."""

    latents: Tensor
    """(clips, 12, T, H, W) in DiT space."""
    captions: list[str]
    lengths: Tensor
    """(clips,) tokens of the captions."""


class TinyMochi(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.t5 = T5EncoderModel(T5Config(**hugging_face_entries(T5_CONFIG)))
        self.dit = new_dit()


def new_dit() -> AsymmDiT:
    """A denoiser whose blocks begin by adding nothing and whose prediction begins at zero (adaLN-Zero, Peebles & Xie)."""
    dit = AsymmDiT(CONFIG)
    with torch.no_grad():
        for block in dit.joint_blocks():
            for mod in (block.mod_x, block.mod_y):
                mod.weight.zero_()
                mod.bias.zero_()
        for layer in (dit.final_layer.mod, dit.final_layer.linear):
            layer.weight.zero_()
            layer.bias.zero_()
        dit.pos_frequencies.copy_(_frequencies(CONFIG))
    return dit


def _frequencies(config: AsymmDiTConfig) -> Tensor:
    """(3, heads, head_dim / 2): each pair turns along one direction of time and space, slowly or fast."""
    shape = (config.num_heads, config.head_dim // 2)
    low, high = map(math.log, ANGLES)
    magnitude = torch.empty(shape).uniform_(low, high).exp()
    direction = nn.functional.normalize(torch.randn(3, *shape), dim=0)
    per_axis = torch.tensor([1.0, 1 / PATCH_DISTANCE, 1 / PATCH_DISTANCE])
    return per_axis[:, None, None] * magnitude * direction


def random_clips(
    rng: np.random.Generator, count: int, size: tuple[int, int, int], vae: AsymmVAE, tokenizer: Tokenizer
) -> Clips:
    """Draw and encode clips."""
    frames, height, width = size
    scenes = [random_clip(rng, width / height) for _ in range(count)]
    pixels = [draw(scene, frames, height, width) for scene, _ in scenes]
    latents = [_encoded(vae, pixels[i : i + 4]) for i in range(0, count, 4)]
    captions = [caption for _, caption in scenes]
    return Clips(torch.cat(latents), captions, torch.tensor([len(tokenizer(c).input_ids) for c in captions]))


@torch.no_grad()
def _encoded(vae: AsymmVAE, pixels: list[Any]) -> Tensor:
    device = next(vae.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        return normalize_latents(tiny_vae.posterior_of(vae, tiny_vae.to_video(pixels).to(device)).mean)


def loss(tiny: TinyMochi, tokenizer: Tokenizer, clips: Clips, rng: np.random.Generator) -> Tensor:
    """The error of the velocity on random clips; their captions are equally long, or all dropped, which is faster."""
    device = tiny.dit.pos_frequencies.device
    count = BATCH_TOKENS * CONFIG.patch_size**2 // clips.latents[0, 0].numel()
    alike = torch.nonzero(clips.lengths == clips.lengths[rng.integers(len(clips.lengths))]).flatten()
    chosen = alike[torch.from_numpy(rng.integers(len(alike), size=count))]
    captions = [clips.captions[i] for i in chosen]
    embeds, mask = features(tiny, tokenizer, captions)
    if rng.random() < CAPTION_DROPOUT:
        mask = torch.zeros_like(mask)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    # One level in each of as many equal parts of [0, 1]: less noisy than independent ones.
    levels = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    noise = torch.randn(clips.latents[chosen].shape, generator=generator)
    return velocity_loss(tiny.dit, clips.latents[chosen].to(device), embeds, mask, levels.to(device), noise.to(device))


def features(tiny: TinyMochi, tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(B, L, 64) text features and (B, L) mask of captions that are equally long."""
    ids = torch.tensor([tokenizer(caption).input_ids for caption in captions], device=tiny.dit.pos_frequencies.device)
    return tiny.t5(input_ids=ids).last_hidden_state, torch.ones_like(ids, dtype=torch.bool)


def read_clips(path: Path) -> Clips:
    """What `write_clips` wrote."""
    file = open_tensors(path)
    latents, lengths = (file.tensors[name].read() for name in ("latents", "lengths"))
    return Clips(latents, json.loads(file.metadata["captions"]), lengths)


def write_clips(path: Path, clips: Clips) -> None:
    """As one file, whole or not at all."""
    tensors = from_state_dict({"latents": clips.latents, "lengths": clips.lengths})
    write_safetensors(path, tensors, {"captions": json.dumps(clips.captions)})


def choose(rng: np.random.Generator, sets: list[Clips]) -> Clips:
    """Clips of one size, by their shares."""
    return sets[int(rng.choice(len(sets), p=SHARES))]
