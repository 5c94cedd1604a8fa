"""Train a small denoiser and its text encoder together, on latents of procedural clips."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, autocast, nn

from ...autoencoder.latents import normalize_latents
from ...autoencoder.model import AsymmVAE
from ...checkpoints import from_state_dict, open_checkpoint
from ...checkpoints.formats.writer import write_safetensors
from ...checkpoints.names.t5 import hugging_face_entries
from ...config import AsymmDiTConfig, T5EncoderConfig
from ...transformer.model import AsymmDiT
from ..levels import draw_levels
from ..objective import velocity_loss
from . import vae as tiny_vae
from .shapes import draw, random_clip

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

CONFIG = AsymmDiTConfig(
    depth=6, hidden_size_x=192, hidden_size_y=96, num_heads=3, text_width=64, mlp_size_x=512, mlp_size_y=256
)
T5_CONFIG = T5EncoderConfig(depth=2, width=64, num_heads=4, head_dim=16, mlp_size=128)
SIZES = ((13, 64, 64), (13, 64, 96), (25, 64, 64))
"""(frames, height, width) of the clips, in pixels."""
SHARES = (0.6, 0.2, 0.2)
"""Fraction of the batches for each of `SIZES`."""
USUAL_ERRORS = {
    0.0: 0.5, 0.02: 0.33, 0.05: 0.2, 0.1: 0.123, 0.2: 0.0735, 0.3: 0.0555, 0.4: 0.047, 0.5: 0.0432,
    0.6: 0.044, 0.7: 0.051, 0.8: 0.074, 0.9: 0.178, 0.95: 0.397, 0.97: 0.573, 0.99: 0.697, 1.0: 0.717,
}  # fmt: skip
"""Squared error of the velocity by noise level, for 13 and 25 frames together, on clips that this denoiser had not seen, 1,800
steps after `frames`."""
EVEN_ERROR = 0.12
"""Value to which the errors of all noise levels are weighted in the stage `details`: about the loss of the earlier stages."""
FAINT = 0.3
"""Noise levels below this count less and less: what is learned there is too fine to be seen."""
DETAIL_SHIFT = 2.0
"""Factor on the odds sigma / (1 - sigma) of uniformly drawn noise levels in the stage `details`, to get more high ones."""
BATCH_TOKENS = 3200
"""Video tokens in a batch."""
CAPTION_DROPOUT = 0.15
ANGLES = (0.15, 2.0)
"""Slowest and fastest rotation of a new model, in radians per latent frame or patch."""
PATCH_DISTANCE = 48
"""Distance between patches in Mochi's coordinates, in which every grid has the same area: 4 x 4 patches are 192 wide."""


@dataclass(frozen=True)
class Clips:
    """Encoded clips of one size, with their captions."""

    latents: Tensor
    """(clips, 12, T, H, W) in DiT space."""
    captions: list[str]
    lengths: Tensor
    """(clips,) number of tokens of each caption."""


class TinyMochi(nn.Module):
    """Denoiser and text encoder in one module, so that one optimizer trains both."""

    def __init__(self) -> None:
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5EncoderModel

        super().__init__()
        self.t5 = T5EncoderModel(T5Config(**hugging_face_entries(T5_CONFIG)))
        self.dit = new_dit()


def new_dit() -> AsymmDiT:
    """A denoiser whose blocks initially add nothing and whose initial prediction is zero (adaLN-Zero, Peebles & Xie)."""
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
    """(3, heads, head_dim / 2) rotary frequencies; each pair has a random direction in (t, y, x) and a random speed."""
    shape = (config.num_heads, config.head_dim // 2)
    low, high = map(math.log, ANGLES)
    magnitude = torch.empty(shape).uniform_(low, high).exp()
    direction = nn.functional.normalize(torch.randn(3, *shape), dim=0)
    per_axis = torch.tensor([1.0, 1 / PATCH_DISTANCE, 1 / PATCH_DISTANCE])
    return per_axis[:, None, None] * magnitude * direction


def random_clips(
    rng: np.random.Generator, count: int, size: tuple[int, int, int], vae: AsymmVAE, tokenizer: Tokenizer
) -> Clips:
    """Draw and encode `count` clips of `size` (frames, height, width)."""
    frames, height, width = size
    scenes = [random_clip(rng, width / height) for _ in range(count)]
    pixels = [draw(scene, frames, height, width) for scene, _ in scenes]
    latents = [_encoded(vae, pixels[i : i + 4]) for i in range(0, count, 4)]
    captions = [caption for _, caption in scenes]
    return Clips(torch.cat(latents), captions, torch.tensor([len(tokenizer(c).input_ids) for c in captions]))


@torch.no_grad()
def _encoded(vae: AsymmVAE, pixels: list[Any]) -> Tensor:
    device = next(vae.parameters()).device
    with autocast(device.type, torch.bfloat16):
        return normalize_latents(tiny_vae.posterior_of(vae, tiny_vae.to_video(pixels).to(device)).mean)


def loss(
    tiny: TinyMochi,
    tokenizer: Tokenizer,
    clips: Clips,
    rng: np.random.Generator,
    frame_levels: float = 0.0,
    *,
    details: bool = False,
) -> Tensor:
    """Velocity loss of one random batch; its captions are equally long, to avoid padding, or all dropped.

    `frame_levels` is the probability of per-frame noise levels. For `details`, errors are weighted by `level_weights`:
    unweighted, noise levels near 1 would drown out the others, although most of their error is unpredictable for any denoiser.
    """
    device = tiny.dit.pos_frequencies.device
    count = BATCH_TOKENS * CONFIG.patch_size**2 // clips.latents[0, 0].numel()
    same_length = torch.nonzero(clips.lengths == clips.lengths[rng.integers(len(clips.lengths))]).flatten()
    chosen = same_length[torch.from_numpy(rng.integers(len(same_length), size=count))]
    embeds, mask = text_features(tiny, tokenizer, [clips.captions[i] for i in chosen])
    if rng.random() < CAPTION_DROPOUT:
        mask = torch.zeros_like(mask)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    # Stratified noise levels, one in each of `count` equal parts of [0, 1]: less variance than independent ones.
    sigma = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    latents, noise = clips.latents[chosen], torch.randn(clips.latents[chosen].shape, generator=generator)
    if rng.random() < frame_levels:
        sigma = draw_levels(sigma, noise.shape[2], generator)
    weights = None
    if details:
        sigma = DETAIL_SHIFT * sigma / (1 + (DETAIL_SHIFT - 1) * sigma)
        weights = level_weights(sigma).to(device)
    batch = latents.to(device), embeds, mask, sigma.to(device), noise.to(device)
    return velocity_loss(tiny.dit, *batch, weights=weights)


def level_weights(sigma: Tensor) -> Tensor:
    """Weights, shape of `sigma`, that bring the errors at noise levels of `FAINT` and above to `EVEN_ERROR`; below, they fall.

    After "Analyzing and Improving the Training Dynamics of Diffusion Models" (Karras et al., arXiv 2312.02696), where a small
    network learns the usual errors; here they are tabulated.
    """
    levels, errors = (np.array([*part]) for part in (USUAL_ERRORS, USUAL_ERRORS.values()))
    usual = torch.from_numpy(np.interp(sigma.numpy(), levels, errors)).to(sigma.dtype)
    return EVEN_ERROR / usual * (sigma / FAINT).clamp(max=1)


def text_features(tiny: TinyMochi, tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Text features (B, L, 64) and an all-True mask (B, L) for captions with the same number of tokens."""
    ids = torch.tensor([tokenizer(caption).input_ids for caption in captions], device=tiny.dit.pos_frequencies.device)
    return tiny.t5(input_ids=ids).last_hidden_state, torch.ones_like(ids, dtype=torch.bool)


def read_clips(path: Path) -> Clips:
    """Read clips from a file written by `write_clips`."""
    file = open_checkpoint(path)
    latents, lengths = (file.tensors[name].read() for name in ("latents", "lengths"))
    return Clips(latents, json.loads(file.metadata["captions"]), lengths)


def write_clips(path: Path, clips: Clips) -> None:
    """Write clips to one safetensors file, completely or not at all."""
    tensors = from_state_dict({"latents": clips.latents, "lengths": clips.lengths})
    write_safetensors(path, tensors, {"captions": json.dumps(clips.captions)})


def choose_set(rng: np.random.Generator, sets: list[Clips]) -> Clips:
    """Choose a random set of clips, with probabilities `SHARES`."""
    return sets[int(rng.choice(len(sets), p=SHARES))]
