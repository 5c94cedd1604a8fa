"""Fused Triton kernels for the operations between matrix products: inputs are read once, results written once.

Each is a PyTorch custom operator in the namespace `mochi`, so that `torch.compile` and fake tensors treat it as one operation.
All compute in float32 and round once. The plain versions in `transformer`, `quantization` and `autoencoder` are their references,
and run wherever `fused` is False.

| operator | computes |
|---|---|
| `modulated_norm` | RMS norm and modulation |
| `joint_heads` | packed q, k, v of both streams to joint ones: q/k norm, rotation, placement |
| `gated_residual` | a stream plus the gated RMS norm of its branch |
| `gated_residual_norm` | the same, and the modulated norm that follows |
| `swiglu` | silu(gate) * value of packed halves |
| `final_norm` | LayerNorm with shift and scale |
| `quantize_rows` | matrix to float8_e4m3fn with a scale per row |
| `frame_sums`, `merge_sums` | mean and variance of each channel group of each frame |
| `norm_silu_pad` | group norm, SiLU, the previous two frames and padding for a causal convolution |

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
