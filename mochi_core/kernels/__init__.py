"""Fused kernels for GPUs, in Triton: what stands between matrix products, read once and written once.

Each is a custom operator of PyTorch under the namespace `mochi`, so that `torch.compile` and fake tensors take it as one
operation. All compute in float32 and round once. Their references, and what runs wherever `fused` says no, are the plain
versions of the same names in `transformer`, `quantization` and `autoencoder`.

| operator | what it computes |
|---|---|
| `modulated_norm` | RMS norm and modulation |
| `joint_heads` | packed q, k, v of both streams to joint ones: q/k norm, rotation, placement |
| `gated_residual` | a stream and the gated RMS norm of its branch |
| `gated_residual_norm` | the same, and the modulated norm that follows |
| `swiglu` | silu(gate) * value of packed halves |
| `final_norm` | LayerNorm with shift and scale |
| `quantize_rows` | matrix to float8_e4m3fn with a scale per row |
| `frame_sums`, `merge_sums` | mean and variance of each group of channels of each frame |
| `norm_silu_pad` | group norm, SiLU, the last two frames and padding for a causal convolution |

`using` and `set_default` choose between them and the plain versions.
"""

from .autoencoder import frame_sums, merge_sums, norm_silu_pad
from .choice import CHOICES, Kernels, chosen, fused, reason, set_default, using
from .denoiser import (
    final_norm,
    gated_residual,
    gated_residual_norm,
    joint_heads,
    modulated_norm,
    quantize_rows,
    swiglu,
)

__all__ = [
    "CHOICES",
    "Kernels",
    "chosen",
    "final_norm",
    "frame_sums",
    "fused",
    "gated_residual",
    "gated_residual_norm",
    "joint_heads",
    "merge_sums",
    "modulated_norm",
    "norm_silu_pad",
    "quantize_rows",
    "reason",
    "set_default",
    "swiglu",
    "using",
]
