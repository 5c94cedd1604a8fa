"""Check what works on a device, comparing each result with plain arithmetic on a small input; and why the rest does not."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels as fused_kernels
from ..autoencoder.layers import unfolds_conv3d
from ..autoencoder.model import AsymmVAE
from ..config import AsymmDiTConfig, AsymmVAEConfig
from ..quantization.fp8 import unsupported_reason as fp8_unsupported_reason
from ..quantization.weights import FP8_ROWWISE, QUANTIZERS, QuantizedLinear
from ..transformer.attention import BACKENDS, choose_attention, sdpa, unsupported_reason
from ..transformer.model import AsymmDiT
from .attempt import attempt, compared

DTYPE = torch.bfloat16
"""Dtype of the probes: that of the released weights."""
TOLERANCE, NETWORK_TOLERANCE, TOLERANCE_8_BITS = 0.02, 0.05, 0.1
"""Bounds on a probe's largest error: for bf16 rounding of one operation, of a network, and for 8-bit operands."""
IN_8_BITS = ("sage", FP8_ROWWISE)
ATTENTION_SHAPE = (3, 1, 2, 333, 128)
"""q, k and v, each (B, heads, length, head_dim); head_dim is the released model's, length is not a power of two."""
DIT = AsymmDiTConfig(
    depth=2,
    hidden_size_x=256,
    hidden_size_y=128,
    num_heads=2,
    text_width=64,
    pool_heads=4,
    mlp_size_x=384,
    mlp_size_y=256,
)
VAE = AsymmVAEConfig(
    decoder_channels=(32, 32, 32, 32),
    decoder_blocks=(1, 1, 1, 1, 1),
    encoder_channels=(32, 32, 32, 32),
    encoder_blocks=(1, 1, 1, 1, 1),
)
"""The smallest models with all kinds of layers; group norms have 32 groups."""
M = TypeVar("M", bound=nn.Module)


def kernels(device: torch.device) -> dict[str, Any]:
    """Kernels used on `device` between matrix products: {"chosen", "reason"}; the reason is None if they are fused."""
    return {"chosen": fused_kernels.chosen(device), "reason": fused_kernels.reason(device)}


def convolutions(device: torch.device) -> dict[str, Any]:
    """How the core's autoencoder convolves in 16 bits on `device`: {"chosen", "reason"}; the reason is None for plain 3D."""
    if not unfolds_conv3d(torch.empty(1, device=device, dtype=DTYPE)):
        return {"chosen": "in three dimensions", "reason": None}
    reason = f"for 3D convolutions, PyTorch {torch.__version__} copies every value 27 times instead of using cuDNN"
    return {"chosen": "frame by frame", "reason": f"{reason} {torch.backends.cudnn.version()}"}


def networks(device: torch.device) -> dict[str, Any]:
    """Compare a small denoiser and decoder in bf16 on `device`, with its kernels, with plain float32 on the CPU."""
    return {"denoiser": attempt(_denoiser, device), "decoder": attempt(_decoder, device)}


@torch.no_grad()
def _denoiser(device: torch.device) -> dict[str, Any]:
    latents, text, mask = gaussian(1, 12, 2, 12, 10), gaussian(1, 9, DIT.text_width), torch.arange(9)[None] < 7
    arguments = latents, torch.tensor([0.5]), text, mask
    dit = randomized(AsymmDiT(DIT))
    exact = dit(*arguments)
    return compared(dit.to(device, DTYPE)(*(t.to(device) for t in arguments)), exact, NETWORK_TOLERANCE)


@torch.no_grad()
def _decoder(device: torch.device) -> dict[str, Any]:
    latents, vae = gaussian(1, 12, 2, 6, 8), randomized(AsymmVAE(VAE, encoder=False))
    exact = vae.decode(latents)
    return compared(vae.to(device, DTYPE).decode(latents.to(device, DTYPE)), exact, NETWORK_TOLERANCE)


def attention(device: torch.device) -> dict[str, Any]:
    """The backend that "auto" selects on `device`, and for every backend its error against float64 or why it is unavailable."""
    q, k, v = gaussian(*ATTENTION_SHAPE).to(DTYPE)
    exact = sdpa(q.double(), k.double(), v.double())
    here = [t.to(device) for t in (q, k, v)]
    return {"auto": attempt(_automatic, device), **{name: attempt(_backend, name, here, exact) for name in BACKENDS}}


def _automatic(device: torch.device) -> dict[str, Any]:
    choice = choose_attention("auto", device, DTYPE)
    return {"chosen": choice.name, "reason": choice.reason}


def _backend(name: str, qkv: list[Tensor], exact: Tensor) -> dict[str, Any]:
    if reason := unsupported_reason(name, qkv[0]):
        return {"works": False, "reason": reason}
    return compared(choose_attention(name, qkv[0].device, DTYPE).run(*qkv), exact, _tolerance(name))


def products(device: torch.device) -> dict[str, Any]:
    """For layers with each kind of quantised weight, the error against float64 or why the kind does not work as intended."""
    return {kind: attempt(_product, kind, device) for kind in QUANTIZERS}


@torch.no_grad()
def _product(kind: str, device: torch.device) -> dict[str, Any]:
    if kind == FP8_ROWWISE and (reason := fp8_unsupported_reason(device)):
        return {"works": False, "reason": f"weights are dequantized instead: {reason}"}
    layer, x = QuantizedLinear(QUANTIZERS[kind](gaussian(64, 256))), gaussian(32, 256).to(DTYPE)
    exact = F.linear(x.double(), layer.dequantized().double())
    return compared(layer.to(device)(x.to(device)), exact, _tolerance(kind))


def _tolerance(name: str) -> float:
    return TOLERANCE_8_BITS if name in IN_8_BITS else TOLERANCE


def gaussian(*shape: int) -> Tensor:
    """The same standard normal values in every run, float32 on the CPU; does not touch the global generators."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def randomized(module: M) -> M:
    """Set random weights that keep signals from vanishing or exploding; norm weights stay 1."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.copy_(gaussian(*parameter.shape) * parameter[0].numel() ** -0.5)
    return module.requires_grad_(False).eval()
