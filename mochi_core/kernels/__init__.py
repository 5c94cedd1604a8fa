"""Fused kernels for GPUs, in Triton: what stands between matrix products, read once and written once.

Each is a custom operator of PyTorch under the namespace `mochi`, so that `torch.compile` and fake tensors take it as one
operation. All compute in float32 and round once. Their references, and what runs wherever `fused` says no, are the plain
versions of the same names in `transformer` and `autoencoder`.

| operator | what it computes |
|---|---|
| `modulated_norm` | RMS norm and modulation |
| `joint_heads` | packed q, k, v of both streams to joint ones: q/k norm, rotation, placement |
| `gated_residual` | a stream and the gated RMS norm of its branch |
| `gated_residual_norm` | the same, and the modulated norm that follows |
| `swiglu` | silu(gate) * value of packed halves |
| `final_norm` | LayerNorm with shift and scale |

`using` and `set_default` choose between them and the plain versions.
"""

from .choice import CHOICES, Kernels, chosen, fused, reason, set_default, using
from .denoiser import final_norm, gated_residual, gated_residual_norm, joint_heads, modulated_norm, swiglu

__all__ = [
    "CHOICES",
    "Kernels",
    "chosen",
    "final_norm",
    "fused",
    "gated_residual",
    "gated_residual_norm",
    "joint_heads",
    "modulated_norm",
    "reason",
    "set_default",
    "swiglu",
    "using",
]
