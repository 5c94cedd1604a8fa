"""The load of denoiser and decoder on a GPU, ours next to ComfyUI's own classes and diffusers, counted without a GPU.

Kernels started, bytes moved and peak live memory, at the released sizes and 848 x 480; and from these, the least time of a step
on some cards, by their published rates. Takes minutes on any machine, and measures no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MIB, keep, markdown, page
from benchmarks.peers import comfy_dit, comfy_vae, diffusers_dit, diffusers_vae
from benchmarks.simulated_gpu import KERNELS, GpuCounter, no_attention, simulated_gpu, text_of_lengths, using
from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE

CONFIG, DTYPE, TEXT_TOKENS = AsymmDiTConfig(), torch.bfloat16, 256
FRAMES = (25, 85, 163)
LIMITS = (3, 5, 24)
LARGEST = 5
"""Number of operations outside matrix products that are listed, those that move most."""


@dataclass(frozen=True)
class Card:
    """Published peak rates: dense, accumulating in float32."""

    name: str
    flops: float
    """Peak rate of bf16 products, FLOP/s."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""


CARDS = (
    Card("H100 SXM", 989.4e12, 3.35e12),
    Card("RTX 4090", 165.2e12, 1008e9),
    Card("RTX 3090", 71e12, 936e9),
)
"""Sources, all NVIDIA's: the datasheet of the H100 Tensor Core GPU, and appendix A of the whitepapers on the Ada and the Ampere
GA102 GPU architectures."""

NOTE = (
    "**Counted, not measured**: the calls were made on fake CUDA tensors, which have sizes but no memory. bf16, released sizes, "
    f"848 x 480, {CONFIG.depth} blocks, {TEXT_TOKENS} text tokens; conditioning is prepared for ours, as in a sampling run. One "
    "operation counts as one kernel, and each operand once, in full; views, allocations and what happens inside an operation "
    "are not counted. Attention is replaced by an empty result for all, and diffusers' search for valid text tokens by its "
    "result. Per block is a whole forward, divided by the blocks; per frame, a whole decode. The peak is above weights, inputs "
    "and prepared conditioning. Our decode runs under a memory limit, the video included; the peers have none, and decode the "
    "whole clip at once."
)
ROOFLINE = (
    "**Computed from published rates, not measured**; no card reaches them. One forward, one condition, as if the weights were "
    "on the card. Each matrix product takes the longer of its FLOPs at the peak rate of dense bf16 products with float32 sums "
    "and its bytes at the memory's bandwidth, attention its FLOPs, everything else its bytes; nothing overlaps, and starting a "
    "kernel costs nothing. In brackets: the time outside products and attention. Rates: "
    + "; ".join(f"{card.name} {card.flops / 1e12:.0f} TFLOP/s and {card.bandwidth / 1e9:.0f} GB/s" for card in CARDS)
    + " (NVIDIA's H100 datasheet, and the tables in appendix A of its whitepapers on the Ada and the Ampere GA102 architectures)."
)
Call = Callable[[], object]
Contender = Callable[[int], Call]
"""Frames -> the call to count."""


def latents(frames: int) -> Tensor:
    return torch.empty(1, 12, (frames + 5) // 6, 60, 106, device="cuda", dtype=DTYPE)


def prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Noise level, text features and mask of a full-length prompt."""
    features = torch.empty(1, TEXT_TOKENS, CONFIG.text_width, device="cuda", dtype=DTYPE)
    mask = torch.ones(1, TEXT_TOKENS, device="cuda", dtype=torch.bool)
    return torch.ones(1, device="cuda", dtype=DTYPE), features, mask


def our_forward(frames: int, kernels: str) -> Call:
    dit, x = AsymmDiT(CONFIG, device="cuda", dtype=DTYPE), latents(frames)
    text = text_of_lengths(dit, TEXT_TOKENS)
    modulation, rope = dit.modulation(torch.ones(1, device="cuda"), text.pooled), dit.rope(x.shape, x.device)
    return with_kernels(kernels, lambda: dit.denoise(x, text, modulation, rope, attend=no_attention))


def comfyui_forward(frames: int) -> Call:
    dit, x, (sigma, features, mask) = comfy_dit(CONFIG.depth, DTYPE, "cuda"), latents(frames), prompt()
    import comfy.ldm.genmo.joint_model.asymm_models_joint as host

    def attention(q: Tensor, _k: Tensor, _v: Tensor, *_: object, **__: object) -> Tensor:
        return torch.empty_like(q.transpose(1, 2).flatten(2))  # like the host's: heads last, and joined

    call = partial(dit, x, sigma, features, mask, num_tokens=TEXT_TOKENS)
    return patch.object(host, "optimized_attention", attention)(lambda: call())


def diffusers_forward(frames: int) -> Call:
    dit, x, (sigma, features, mask) = diffusers_dit(CONFIG.depth, DTYPE, "cuda"), latents(frames), prompt()

    def places(mask: Tensor, **_: object) -> Tensor:
        return torch.empty(len(mask), 1, device=mask.device, dtype=torch.int64)

    @patch.object(torch, "nonzero", places)
    @patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: no_attention(q, k, v))
    def call() -> object:
        return dit(x, features, sigma, mask, return_dict=False)

    return call


def our_decode(frames: int, kernels: str, limit: int) -> Call:
    vae, z = AsymmVAE(device="cuda", dtype=DTYPE, encoder=False), latents(frames)
    return with_kernels(kernels, lambda: vae.decode(z, limit << 30))


def with_kernels(kernels: str, function: Call) -> Call:
    def call() -> object:
        with using(kernels):
            return function()

    return call


def comfyui_decode(frames: int) -> Call:
    vae, z = comfy_vae(DTYPE, "cuda"), latents(frames)
    return lambda: vae.decode(z)


def diffusers_decode(frames: int) -> Call:
    vae, z = diffusers_vae(DTYPE, "cuda"), latents(frames)
    return lambda: vae.decode(z, return_dict=False)


FORWARDS: dict[str, Contender] = {
    **{f"ours, {kernels}": partial(our_forward, kernels=kernels) for kernels in KERNELS},
    "ComfyUI": comfyui_forward,
    "diffusers": diffusers_forward,
}
DECODES: dict[str, Contender] = {
    **{
        f"ours, {kernels}, {limit} GiB": partial(our_decode, kernels=kernels, limit=limit)
        for kernels in KERNELS
        for limit in LIMITS
    },
    "ComfyUI": comfyui_decode,
    "diffusers": diffusers_decode,
}


def count(contender: Contender, frames: int) -> GpuCounter:
    with simulated_gpu():
        call = contender(frames)
        with GpuCounter([latents(frames).numel()]) as counter:  # our decode reads the number of finite latents
            call()
    return counter


def counted(contenders: dict[str, Contender], frames: tuple[int, ...]) -> dict[tuple[int, str], GpuCounter]:
    """Counters by frames and contender."""
    counters = {}
    for many in frames:
        for name, contender in contenders.items():
            counters[many, name] = count(contender, many)
            print(f"{many} frames, {name}: {counters[many, name].starts} kernels", file=sys.stderr, flush=True)
    return counters


def row(case: str, name: str, counter: GpuCounter, parts: int) -> tuple[str, ...]:
    """Counts divided by `parts`."""
    kinds = counter.moved.most_common(LARGEST)
    return (
        case,
        name,
        f"{counter.starts / parts:.0f}",
        f"{len(counter.products) / parts:.0f}",
        f"{counter.moved.total() / parts / 1e9:.1f}",
        ", ".join(f"{kind.split('.')[1]} {moved / parts / 1e9:.1f}" for kind, moved in kinds),
        f"{counter.product_bytes / parts / 1e9:.1f}",
        f"{counter.peak / MIB:.0f}",
    )


HEAD = (
    "what", "contender", "kernels", "of which products", "GB outside of products", "most of it by", "GB in products", "peak, MiB",
)  # fmt: skip


def attention_flops(frames: int) -> int:
    """FLOPs of attention in a forward: the products of q and k, and of the softmax and v, over visual and text tokens."""
    tokens = latents(frames).shape[2:].numel() // CONFIG.patch_size**2 + TEXT_TOKENS
    return CONFIG.depth * 2 * 2 * tokens**2 * CONFIG.hidden_size_x


def roofline(card: Card, counter: GpuCounter, flops_of_attention: int) -> str:
    """Seconds in total, and in brackets outside products and attention."""
    products = sum(max(flops / card.flops, moved / card.bandwidth) for flops, moved in counter.products)
    outside = counter.moved.total() / card.bandwidth
    return f"{products + flops_of_attention / card.flops + outside:.3f} ({outside:.3f})"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    forwards, decodes = counted(FORWARDS, FRAMES), counted(DECODES, (FRAMES[0], FRAMES[-1]))
    rows = [row(f"{n} frames, per block", name, counter, CONFIG.depth) for (n, name), counter in forwards.items()]
    rows += [row(f"decode of {n} frames, per frame", name, counter, n) for (n, name), counter in decodes.items()]
    with simulated_gpu():
        attention = {frames: attention_flops(frames) for frames in FRAMES}
    seconds = [
        (f"{n} frames", name, *(roofline(card, counter, attention[n]) for card in CARDS))
        for (n, name), counter in forwards.items()
    ]
    cards = ("forward", "contender", *(f"{card.name}, s" for card in CARDS))
    lines = [*markdown(HEAD, rows), "", "## The least time of a forward", "", ROOFLINE, "", *markdown(cards, seconds)]
    keep("traffic", page("Counted on a simulated GPU", NOTE, *lines))


if __name__ == "__main__":
    main()
