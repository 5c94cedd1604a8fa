"""What every option that changes the result saves, and how far its video is from the exact one.

The trained tiny model, 25 frames of 64 x 64, 64 steps, guidance 4.5; the same noise and prompts throughout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import markdown, page, write_report
from benchmarks.peers import DEVICE
from mochi_core import (
    AsymmDiT,
    AsymmVAE,
    BlockCache,
    VideoSize,
    denormalize_latents,
    guidance_schedule,
    linear_quadratic_schedule,
    load_text_encoder,
    load_transformer,
    load_vae,
    sample,
)
from mochi_core.pipeline import initial_noise
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.sampling.sample import EncodedPrompts

TINY = Path(__file__).parents[1] / "models"
ROUNDS = 3
FAST = {"sigmas": linear_quadratic_schedule(8, threshold_noise=0.1, linear_steps=6), "scale": 1.5}
"""The settings that FastMochi was trained for."""
STEPS, SCALE, SHAPE = 64, 4.5, VideoSize(64, 64, 25).latent_shape()
SIGMAS = linear_quadratic_schedule(STEPS)
PROMPTS = (
    "a red star moving to the right",
    "A yellow circle falling over a gray background.",
    "a video of a blue square growing larger",
)
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    **{f"teacache, threshold {t}": {"cache": BlockCache("teacache", t)} for t in (0.03, 0.06, 0.09, 0.15)},
    **{f"first_block, threshold {t}": {"cache": BlockCache("first_block", t)} for t in (0.01, 0.02, 0.03, 0.05)},
    "guidance in the first half of the steps": {"end": 0.5},
    "guidance in the last half of the steps": {"start": 0.5},
    "guidance from 10 % to 80 % of the steps": {"start": 0.1, "end": 0.8},
    "guidance from 10 % of the steps on": {"start": 0.1},
    "guidance falling from 4.5 to 1": {"end_scale": 1.0},
    "teacache 0.06, guidance from 10 % on": {"cache": BlockCache("teacache", 0.06), "start": 0.1},
    **{f"matrices in {kind}": {"quantize": kind} for kind in QUANTIZERS},
    "FastMochi's 8 steps, guidance 1.5": FAST,
}
NOTE = (
    f"Means over {len(PROMPTS)} prompts; {STEPS} steps, guidance {SCALE}, 25 frames of 64 x 64, float32. Errors are relative "
    "(root of the summed squares) to the exact run on the same noise: of the final latents, and of the decoded pixels in "
    "[-1, 1]. Blocks skipped are a share of all blocks that the exact run calls. Time is that of the denoising alone, the "
    f"fastest of {ROUNDS} rounds, in each of which all contenders take turns.\n\n"
    "**This is a model of 6 narrow blocks that draws coloured shapes. It shows that the criteria work and what they cost "
    "there; it says little about the released model**, which has 48 blocks, has not been run here, and for which TeaCache's "
    "polynomial was fitted: its authors give 1.5 times the speed at 0.06, and 2.1 at 0.09. Whether its results are good "
    "enough has yet to be seen. Matrices in fewer bits save memory; ones this small cost time, because they are dequantized "
    "for every product. The 8 steps are with the same weights, which were not trained for them as FastMochi's were."
)


@dataclass
class Setup:
    dits: dict[str | None, AsymmDiT]
    """By the quantisation of their matrices."""
    vae: AsymmVAE
    prompts: list[EncodedPrompts]
    uncond: EncodedPrompts


@dataclass
class Outcome:
    """The results of one way of sampling for all prompts."""

    latents: list[Tensor]
    seconds: float
    blocks: int


def prepare() -> Setup:
    t5 = load_text_encoder(TINY / "text_encoders" / "t5_tiny.safetensors")
    conditions = [t5.encode(prompt) for prompt in PROMPTS]
    dits = {
        kind: load_transformer(
            TINY / "diffusion_models" / "mochi_tiny.safetensors", torch.float32, DEVICE, quantize=kind
        )
        for kind in (None, *QUANTIZERS)
    }
    return Setup(dits, load_vae(TINY / "vae" / "mochi_tiny_vae.safetensors", device=DEVICE), conditions, t5.encode(""))


def run(
    setup: Setup,
    cache: BlockCache | None = None,
    quantize: str | None = None,
    sigmas: Tensor = SIGMAS,
    scale: float = SCALE,
    **guidance: Any,
) -> Outcome:
    dit, noise = setup.dits[quantize], initial_noise(SHAPE, seed=0)
    scales = guidance_schedule(len(sigmas) - 1, scale, **guidance)
    calls = [0]
    count = [block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for block in dit.blocks]
    start = time.perf_counter()
    latents = [sample(dit, noise, sigmas, prompt, setup.uncond, scales, cache=cache) for prompt in setup.prompts]
    seconds = time.perf_counter() - start
    for hook in count:
        hook.remove()
    return Outcome(latents, seconds, calls[0])


def decoded(setup: Setup, outcome: Outcome) -> list[Tensor]:
    return [setup.vae.decode(denormalize_latents(one).to(DEVICE)).cpu() for one in outcome.latents]


def error(results: list[Tensor], expected: list[Tensor]) -> float:
    return statistics.mean(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(results, expected, strict=True)
    )


def row(name: str, rounds: list[Outcome], exact: list[Outcome], pixels: float) -> tuple[str, ...]:
    """`pixels` is the error of the pixels."""
    one, reference = rounds[0], exact[0]
    return (
        name,
        f"{1 - one.blocks / reference.blocks:.0%}",
        f"{fastest(rounds) / fastest(exact):.2f}",
        f"{error(one.latents, reference.latents):.2%}",
        f"{pixels:.2%}",
    )


def fastest(rounds: list[Outcome]) -> float:
    return min(outcome.seconds for outcome in rounds)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # at this size, more threads only wait for each other
    setup = prepare()
    rounds = [{name: run(setup, **options) for name, options in WAYS.items()} for _ in range(ROUNDS)]
    outcomes = {name: [one[name] for one in rounds] for name in WAYS}
    head = ("", "blocks skipped", "time / exact", "error of latents", "error of pixels")
    videos = {name: decoded(setup, one[0]) for name, one in outcomes.items()}
    errors = {name: error(video, videos["exact"]) for name, video in videos.items()}
    rows = [row(name, found, outcomes["exact"], errors[name]) for name, found in outcomes.items()]
    write_report("opt_in", page("Options that change the result", NOTE, *markdown(head, rows)))


if __name__ == "__main__":
    main()
