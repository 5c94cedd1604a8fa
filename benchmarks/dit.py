"""Time and memory of the denoiser, ours next to diffusers and ComfyUI's own class: a forward, a guided step, a whole run.

On a CPU: full width, depth 2, 256 to 2,048 visual tokens. On a GPU: full depth, 480 x 848, 25, 85 and 163 frames.
"""

from __future__ import annotations

import argparse
import atexit
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import FASTEST, MEDIAN, RATIO, ROUNDS, Column, Timed, compare, page, peak, table, write_report
from benchmarks.peers import DEVICE, comfy_dit, diffusers_dit, our_dit
from mochi_core import AsymmDiTConfig, linear_quadratic_schedule, sample
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.sampling.sample import EncodedPrompts, prepared_velocities
from mochi_core.transformer.attention import Attention, choose_attention
from mochi_core.transformer.offload import stream_blocks

GPU = DEVICE == "cuda"
DEPTH = 48 if GPU else 2
TEXT_TOKENS, STEPS, STEP, GUIDANCE = 77, 64, 20, 4.5
SIGMAS = linear_quadratic_schedule(STEPS)
OTHER_ATTENTION = "cudnn" if GPU else "flash"
"""Also used for ComfyUI's class, whose default is PyTorch's, flash first, on NVIDIA cards and sub-quadratic on CPUs."""
EIGHT_BITS = [name for name in ("fp8", "fp8_rowwise") if name in QUANTIZERS]
OPEN = ExitStack()
"""Contexts that stay open until the process ends."""
atexit.register(OPEN.close)
NOTE = (
    f"{TEXT_TOKENS} valid text tokens of 256, random weights. `ours` is a step inside a sampling run, where the text, the "
    "rotary table and the modulation of all steps have been prepared once, with the attention that `auto` chooses; `ours, "
    "unprepared` is a single call of the model, which does what the peers do at every step, and `ours, compiled` is `ours` "
    "after `compile_blocks`. `ComfyUI` is its class with the "
    f"attention that the host chooses, `ComfyUI, {OTHER_ATTENTION}` the same with PyTorch's {OTHER_ATTENTION} kernel in the "
    "host's override. Names with fp8 keep the matrices in 8 bits. The share relates the least that the step needs (matrix "
    "products and attention, over valid tokens) to the rate of a large square product in the same process and dtype, bf16 "
    "for 8 bits. Weights are those on the device between calls."
)
GUIDED = (
    "Both conditions, with an empty negative prompt (for ComfyUI one token). Ours takes the conditions block by block in one "
    "pass over the weights, or one after the other; `streamed` keeps the weights in main memory and two blocks at a time on "
    f"the device, which on a CPU is a copy. {STEPS} steps are {STEPS} times the median."
)
WHOLE = f"A complete run: `sample`, {STEPS} steps, guidance {GUIDANCE}, once."
WHOLE_COLUMNS = [
    ("seconds", lambda _case, m, _ours: f"{m.median:.1f}"),
    ("weights, MiB", lambda _case, m, _ours: f"{m.largest('weights_mib'):.0f}"),
    peak("the model"),
]
ON_DEVICE: Column = ("all at the peak, GB", lambda _case, m, _ours: f"{m.largest('device_mib') * 2**20 / 1e9:.1f}")


def forward_flops(config: AsymmDiTConfig, tokens: int, text_tokens: int) -> int:
    """FLOPs of one step for one condition, with everything prepared that can be; a multiply-add counts as two."""
    x, y = config.hidden_size_x, config.hidden_size_y
    patch = config.in_channels * config.patch_size**2
    visual = tokens * x * (3 * x + x + 3 * config.mlp_size_x)
    text = text_tokens * y * (x + 3 * config.mlp_size_y)
    attention = 2 * (tokens + text_tokens) ** 2 * x
    blocks = config.depth * (visual + attention + text_tokens * y * 3 * x) + (config.depth - 1) * text
    return 2 * (blocks + 2 * tokens * patch * x)


def inputs(case: dict) -> tuple[Tensor, list[EncodedPrompts]]:
    """Latents and the prompt; for a guided step, also the empty prompt."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, *case["latent"], generator=generator).to(DEVICE)
    embeds = torch.randn(1, 256, 4096, generator=generator).to(DEVICE)
    masks = [(torch.arange(256) < count)[None].to(DEVICE) for count in (TEXT_TOKENS, 0)]
    return latents, [(embeds, mask) for mask in (masks if case["guided"] else masks[:1])]


def ours(
    case: dict, quantize: str | None = None, stream: bool = False, together: bool = True, compiled: bool = False
) -> Timed:
    """A step of a prepared run, or the whole run; `together` runs both conditions in one pass."""
    dtype = getattr(torch, case["dtype"])
    dit = our_dit(AsymmDiTConfig(depth=case["depth"]), dtype, quantize, "cpu" if stream else DEVICE)
    if compiled:
        dit.compile_blocks()
    latents, conditions = inputs(case)
    if stream:
        OPEN.enter_context(stream_blocks(dit, DEVICE))
    if case.get("whole"):
        run = partial(sample, dit, latents)
        return Timed(dit, lambda: run(SIGMAS, *conditions, GUIDANCE), lambda: run(SIGMAS[-2:], *conditions, GUIDANCE))
    attend = choose_attention("auto", DEVICE, dtype, dit.config.head_dim).run
    passes = [conditions] if together else [[condition] for condition in conditions]
    prepared = [prepared_velocities(dit, latents, SIGMAS, each, attend) for each in passes]
    return Timed(dit, lambda: [run(latents, STEP, len(each)) for run, each in zip(prepared, passes, strict=True)])


def unprepared(case: dict) -> Timed:
    dtype, (latents, [condition]) = getattr(torch, case["dtype"]), inputs(case)
    dit = our_dit(AsymmDiTConfig(depth=case["depth"]), dtype)
    attend = choose_attention("auto", DEVICE, dtype, dit.config.head_dim).run
    return Timed(dit, lambda: dit(latents, sigma(), *condition, attention=attend))


def sigma() -> Tensor:
    return SIGMAS[STEP : STEP + 1].to(DEVICE)


def diffusers(case: dict) -> Timed:
    dtype, (latents, [(embeds, mask)]) = getattr(torch, case["dtype"]), inputs(case)
    model, timestep = diffusers_dit(case["depth"], dtype), (1 - sigma()) * 1000
    arguments = latents.to(dtype), embeds.to(dtype), timestep, mask
    return Timed(model, lambda: model(*arguments, return_dict=False))


def comfyui(case: dict, attention: str | None = None) -> Timed:
    """`attention` is one of ours, set as the host's override."""
    dtype, (latents, conditions) = getattr(torch, case["dtype"]), inputs(case)
    model, latents, noise_level = comfy_dit(case["depth"], dtype), latents.to(dtype), sigma()
    options = {}
    if attention is not None:
        choice = choose_attention(attention, DEVICE, dtype, AsymmDiTConfig().head_dim)
        options["optimized_attention_override"] = override(choice.run)
    prompts = [(embeds.to(dtype), mask, max(1, int(mask.sum()))) for embeds, mask in conditions]
    return Timed(model, lambda: [model(latents, noise_level, *each, transformer_options=options) for each in prompts])


def override(attend: Attention):
    """Called as by the host for Mochi: heads first, and the heads joined in the result."""
    return lambda _function, q, k, v, *_, **__: attend(q, k, v).transpose(1, 2).flatten(2)


IN_8_BITS = {f"ours, {name}": partial(ours, quantize=name) for name in EIGHT_BITS}
STREAMED = {
    "ours, streamed": partial(ours, stream=True),
    "ours, streamed, two passes": partial(ours, stream=True, together=False),
}
COMFYUI = {"ComfyUI": comfyui, f"ComfyUI, {OTHER_ATTENTION}": partial(comfyui, attention=OTHER_ATTENTION)}
# Without 8-bit products they only cost time; the guided step shows how much.
FORWARD = {
    "ours": ours,
    "ours, compiled": partial(ours, compiled=True),
    "ours, unprepared": unprepared,
    **(IN_8_BITS if GPU else {}),
    **COMFYUI,
    "diffusers": diffusers,
}
STEPPING = {"ours": ours, "ours, two passes": partial(ours, together=False), **STREAMED, **IN_8_BITS, **COMFYUI}
CONTENDERS = FORWARD | STEPPING
WHOLE_RUNS = ("ours", "ours, streamed", *IN_8_BITS)


def new_case(
    latent: tuple[int, int, int], guided: bool = False, dtype: str = "bfloat16", depth: int = DEPTH, **more: bool
) -> dict:
    config = AsymmDiTConfig(depth=depth)
    texts = (TEXT_TOKENS, 0) if guided else (TEXT_TOKENS,)
    tflop = sum(forward_flops(config, token_count(latent), text) for text in texts) / 1e12
    return {"latent": latent, "depth": config.depth, "dtype": dtype, "guided": guided, "tflop": tflop, **more}


def token_count(latent: tuple[int, int, int]) -> int:
    t, h, w = latent
    return t * h * w // 4


def forward_cases(frames: list[int]) -> list[dict]:
    if GPU:
        return [new_case(latent) for latent in on_gpu(frames)]
    sizes = {"bfloat16": ((4, 16, 16), (2, 32, 32), (4, 32, 32), (8, 32, 32)), "float32": ((4, 16, 16), (4, 32, 32))}
    return [new_case(size, dtype=dtype) for dtype in sizes for size in sizes[dtype]]


def guided_latents(frames: list[int]) -> list[tuple[int, int, int]]:
    return on_gpu(frames) if GPU else [(4, 16, 16), (4, 32, 32)]


def on_gpu(frames: list[int]) -> list[tuple[int, int, int]]:
    return [((count + 5) // 6, 60, 106) for count in frames]


def describe(case: dict) -> str:
    t, h, w = case["latent"]
    frames = f", {6 * t - 5} frames of {8 * h} x {8 * w}" if GPU else ""
    return f"{token_count((t, h, w))} tokens{frames}, depth {case['depth']}, {case['dtype']}"


def share(case: dict, m, _ours) -> str:
    rate = max(run["rate"] for run in m.runs)
    return f"{case['tflop'] * 1e12 / m.median / rate:.0%} of {rate / 1e12:.3g}"


COLUMNS: list[Column] = [
    MEDIAN, FASTEST, RATIO, ("share of TFLOP/s", share), WHOLE_COLUMNS[1], peak("the model"), *([ON_DEVICE] if GPU else []),
]  # fmt: skip
RUN: Column = (f"{STEPS} steps, s", lambda _case, m, _ours: f"{STEPS * m.median:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3, help="timed calls per process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes each (default: %(default)s)")
    parser.add_argument("--frames", type=int, nargs="+", default=[25, 85, 163], help="on a GPU (default: 25 85 163)")
    parser.add_argument(
        "--whole-run", nargs="?", const="ours", choices=WHOLE_RUNS, help="also make one run of the last size"
    )
    options = parser.parse_args()
    measure = partial(compare, "benchmarks.dit", calls=options.calls, rounds=options.rounds)
    forwards, guided = forward_cases(options.frames), guided_latents(options.frames)
    steps, whole = [new_case(latent, guided=True) for latent in guided], [new_case(guided[-1], guided=True, whole=True)]
    lines = ["## One forward", "", *table(describe, forwards, measure(list(FORWARD), forwards), COLUMNS), ""]
    lines += [
        "## A guided step",
        "",
        GUIDED,
        "",
        *table(describe, steps, measure(list(STEPPING), steps), [*COLUMNS, RUN]),
    ]
    if options.whole_run:
        run = compare("benchmarks.dit", [options.whole_run], whole, calls=0, rounds=1)
        columns = [*WHOLE_COLUMNS, *([ON_DEVICE] if GPU else [])]
        lines += ["", "## A whole run", "", WHOLE, "", *table(describe, whole, run, columns)]
    write_report("dit", page("Denoiser", NOTE, *lines))


if __name__ == "__main__":
    main()
