"""Time of one forward of the denoiser, ours beside diffusers and ComfyUI's own class.

On a CPU: full width, depth 2, 256 to 2,048 visual tokens. On a GPU: full depth, 480 x 848, 25, 85 and 163 frames.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.measure import compare, table, write_report
from benchmarks.peers import DEVICE, comfy_dit, diffusers_dit, fill
from mochi_core import AsymmDiT, AsymmDiTConfig, linear_quadratic_schedule
from mochi_core.sample import prepared_velocity

TEXT_TOKENS = 77
STEP = 20
NOTE = (
    f"One forward, {TEXT_TOKENS} valid text tokens of 256, random weights, median over two processes each. `ours` is a step "
    "inside a sampling run, where the text, the rotary table and the modulation of all steps have been prepared once; "
    "`ours, unprepared` is a lone call of the model, which does what the peers do at every step."
)


def inputs(case: dict) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, *case["latent"], generator=generator).to(DEVICE)
    embeds = torch.randn(1, 256, 4096, generator=generator).to(DEVICE)
    mask = (torch.arange(256) < TEXT_TOKENS)[None].to(DEVICE)
    return latents, torch.tensor([0.7375], device=DEVICE), embeds, mask


def our_model(case: dict) -> AsymmDiT:
    config, dtype = AsymmDiTConfig(depth=case["depth"]), getattr(torch, case["dtype"])
    dit = AsymmDiT(config, device=DEVICE, dtype=dtype)
    fill(dit)
    return dit


def ours(case: dict):
    dit, (latents, _, embeds, mask) = our_model(case), inputs(case)
    velocity = prepared_velocity(dit, latents, linear_quadratic_schedule(64), (embeds, mask))
    return lambda: velocity(latents, STEP)


def unprepared(case: dict):
    dit, (latents, sigma, embeds, mask) = our_model(case), inputs(case)
    return lambda: dit(latents, sigma, embeds, mask)


def diffusers(case: dict):
    dtype = getattr(torch, case["dtype"])
    model, (latents, sigma, embeds, mask) = diffusers_dit(case["depth"], dtype), inputs(case)
    latents, embeds, timestep = latents.to(dtype), embeds.to(dtype), (1 - sigma) * 1000
    return lambda: model(latents, embeds, timestep, mask, return_dict=False)


def comfyui(case: dict):
    dtype = getattr(torch, case["dtype"])
    model, (latents, sigma, embeds, mask) = comfy_dit(case["depth"], dtype), inputs(case)
    latents, embeds = latents.to(dtype), embeds.to(dtype)
    return lambda: model(latents, sigma, embeds, mask, TEXT_TOKENS)


CONTENDERS = {"ours": ours, "ours, unprepared": unprepared, "ComfyUI": comfyui, "diffusers": diffusers}


def cases() -> list[dict]:
    if DEVICE == "cuda":
        return [{"latent": (t, 60, 106), "depth": 48, "dtype": "bfloat16"} for t in (5, 15, 28)]
    sizes = {"bfloat16": ((4, 16, 16), (2, 32, 32), (4, 32, 32), (8, 32, 32)), "float32": ((4, 16, 16), (4, 32, 32))}
    return [{"latent": size, "depth": 2, "dtype": dtype} for dtype in sizes for size in sizes[dtype]]


def describe(case: dict) -> str:
    t, h, w = case["latent"]
    frames = f", {6 * t - 5} frames of {8 * h} x {8 * w}" if DEVICE == "cuda" else ""
    return f"{t * h * w // 4} tokens{frames}, depth {case['depth']}, {case['dtype']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5, help="timed calls per process (default: %(default)s)")
    calls = parser.parse_args().calls
    results = compare("benchmarks.dit", list(CONTENDERS), cases(), calls)
    write_report("dit", table("Denoiser, one forward", [describe(case) for case in cases()], results, NOTE))


if __name__ == "__main__":
    main()
