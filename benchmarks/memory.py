"""Working memory of one forward of the denoiser at real sizes, ours beside ComfyUI's own class and diffusers.

Attention takes hours at these sizes on a CPU and gives nothing to see here: it is replaced by an empty result, for all alike.
What it would hold beside its result, a float32 for each token and head, is 4 MiB for 163 frames.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.dit import TEXT_TOKENS, inputs, our_model
from benchmarks.measure import compare, environment, write_report
from benchmarks.peers import comfy_dit, diffusers_dit
from mochi_core import linear_quadratic_schedule
from mochi_core.sample import prepared_velocities

CASES = [{"latent": (t, 60, 106), "depth": 2, "dtype": "bfloat16"} for t in (5, 15, 28)]
NOTE = (
    "Released width, two blocks (more hold no more: blocks follow one another), bf16, 480 x 848. Peak of a forward above "
    f"the weights, prepared conditioning and inputs; {TEXT_TOKENS} text tokens. Attention is replaced by an empty result, for "
    "all alike: on a CPU it would take hours. `guided pair` is the conditional and the unconditional forward in one pass over "
    "the blocks, which the peers do not have."
)


def _empty_attention() -> None:
    """In the layout of PyTorch's flash attention, that of q."""
    F.scaled_dot_product_attention = lambda q, *_, **__: torch.empty_like(q)


def ours(case: dict, num_conditions: int = 1):
    dit, (latents, _, embeds, mask) = our_model(case), inputs(case)
    _empty_attention()
    velocities = prepared_velocities(dit, latents, linear_quadratic_schedule(64), [(embeds, mask)] * num_conditions)
    return lambda: velocities(latents, 20, num_conditions)


def guided_pair(case: dict):
    return ours(case, 2)


def comfyui(case: dict):
    model, (latents, sigma, embeds, mask) = comfy_dit(case["depth"], torch.bfloat16), inputs(case)
    import comfy.ldm.genmo.joint_model.asymm_models_joint as host
    from comfy.ldm.modules.attention import attention_pytorch

    host.optimized_attention = attention_pytorch  # as on a GPU
    _empty_attention()
    latents, embeds = latents.bfloat16(), embeds.bfloat16()
    return lambda: model(latents, sigma, embeds, mask, TEXT_TOKENS)


def diffusers(case: dict):
    model, (latents, sigma, embeds, mask) = diffusers_dit(case["depth"], torch.bfloat16), inputs(case)
    _empty_attention()
    latents, embeds, timestep = latents.bfloat16(), embeds.bfloat16(), (1 - sigma) * 1000
    return lambda: model(latents, embeds, timestep, mask, return_dict=False)


CONTENDERS = {"ours": ours, "ours, guided pair": guided_pair, "ComfyUI": comfyui, "diffusers": diffusers}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    give_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    results = compare("benchmarks.memory", list(CONTENDERS), CASES, calls=0, rounds=1, **give_back)
    head = ("frames", "tokens", *(f"{name}, MiB" for name in CONTENDERS))
    lines = ["# Working memory of one forward", "", environment(), "", NOTE, "", _row(*head), "|---" * len(head) + "|"]
    for case, measured in zip(CASES, results, strict=True):
        t, h, w = case["latent"]
        peaks = [f"{measured[name].peak_mib:.0f}" for name in CONTENDERS]
        lines.append(_row(6 * t - 5, t * h * w // 4, *peaks))
    write_report("memory", "\n".join(lines) + "\n")


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
