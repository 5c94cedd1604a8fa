"""Tiny Mochi models with random weights, written as the files that users have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.random_weights import randomize
from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE, AsymmVAEConfig

TEXT_WIDTH = 64
# With multiples of 96, diffusers computes the same feed-forward sizes; GroupNorm has 32 groups.
DIT = AsymmDiTConfig(
    depth=3, hidden_size_x=96, hidden_size_y=96, num_heads=3, text_width=TEXT_WIDTH, mlp_size_x=256, mlp_size_y=256
)
VAE = AsymmVAEConfig(
    decoder_channels=(32, 32, 32, 32),
    decoder_blocks=(1, 1, 1, 1, 1),
    encoder_channels=(32, 32, 32, 32),
    encoder_blocks=(1, 1, 1, 1, 1),
)
T5_VOCABULARY = 32128
T5_DEPTH = 24  # like T5-XXL: ComfyUI's own loader recognises the encoder by its last block
T5_HEADS = 4


def write_models(models_dir: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write diffusion_models/mochi_preview_bf16, vae/mochi_vae and text_encoders/t5xxl_fp16 (.safetensors)."""
    files = {
        "diffusion_models/mochi_preview_bf16.safetensors": cast(random_dit().state_dict(), dtype),
        "vae/mochi_vae.safetensors": cast(random_vae().state_dict(), dtype),
        "text_encoders/t5xxl_fp16.safetensors": cast(random_t5(), torch.float16),
    }
    for name, tensors in files.items():
        path = models_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def random_dit(config: AsymmDiTConfig = DIT, seed: int = 0, dtype: torch.dtype = torch.float32) -> AsymmDiT:
    """A denoiser whose signals neither vanish nor explode."""
    dit = AsymmDiT(config, dtype=dtype)
    randomize(dit, seed)
    with torch.no_grad():
        dit.pos_frequencies.mul_(0.2)
    return dit.requires_grad_(False).eval()


def random_vae(config: AsymmVAEConfig = VAE, seed: int = 1, dtype: torch.dtype = torch.float32) -> AsymmVAE:
    vae = AsymmVAE(config, dtype=dtype)
    randomize(vae, seed)
    return vae.requires_grad_(False).eval()


def random_t5(width: int = TEXT_WIDTH, seed: int = 2) -> dict[str, Tensor]:
    """Tensors of a narrow T5 v1.1 encoder with the real vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"shared.weight": (T5_VOCABULARY, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(T5_DEPTH):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed_forward)}
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (2 * width, width) for name in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, 2 * width)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, T5_HEADS)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.1 * noise if len(shape) == 1 else noise * shape[1] ** -0.5

    return {name: tensor(shape) for name, shape in shapes.items()}
