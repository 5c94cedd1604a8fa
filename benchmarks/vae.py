"""Time of a decode, ours beside diffusers and ComfyUI's own class.

On a CPU: small frames. On a GPU: 480 x 848 with 25, 85 and 163 frames (a peer that runs out of memory is reported so).
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.measure import compare, table, write_report
from benchmarks.peers import DEVICE, comfy_vae, diffusers_vae, fill
from mochi_core import AsymmVAE

NOTE = (
    "One decode with the released sizes and random weights, median over two processes each. Ours streams; the others hold "
    "the whole clip. diffusers drops surplus frames at the end instead of in each stage, so it computes a little more and "
    "its first frames differ from Genmo's."
)


def latents(case: dict) -> torch.Tensor:
    noise = torch.randn(1, 12, *case["latent"], generator=torch.Generator().manual_seed(0))
    return noise.to(DEVICE, getattr(torch, case["dtype"]))


def ours(case: dict, frames_at_once: int | None = None):
    vae, z = AsymmVAE(device=DEVICE, dtype=getattr(torch, case["dtype"])), latents(case)
    fill(vae)
    options = {} if frames_at_once is None else {"frames_at_once": frames_at_once}
    return lambda: vae.decode(z, **options)


def comfyui(case: dict):
    vae, z = comfy_vae(getattr(torch, case["dtype"])), latents(case)
    return lambda: vae.decode(z)


def diffusers(case: dict):
    vae, z = diffusers_vae(getattr(torch, case["dtype"])), latents(case)
    return lambda: vae.decode(z, return_dict=False)


CONTENDERS = {
    "ours": ours,
    "ours, one frame at a time": lambda case: ours(case, 1),
    "ComfyUI": comfyui,
    "diffusers": diffusers,
}


def cases() -> list[dict]:
    if DEVICE == "cuda":
        return [{"latent": (t, 60, 106), "dtype": "bfloat16"} for t in (5, 15, 28)]
    return [{"latent": (4, 8, 8), "dtype": "float32"}, {"latent": (5, 12, 12), "dtype": "float32"}]


def describe(case: dict) -> str:
    t, h, w = case["latent"]
    return f"{6 * t - 5} frames of {8 * h} x {8 * w}, {case['dtype']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2, help="timed calls per process (default: %(default)s)")
    calls = parser.parse_args().calls
    results = compare("benchmarks.vae", list(CONTENDERS), cases(), calls)
    write_report("vae", table("Autoencoder, one decode", [describe(case) for case in cases()], results, NOTE))


if __name__ == "__main__":
    main()
