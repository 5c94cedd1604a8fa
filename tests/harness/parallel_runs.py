"""What members of a group do in tests; with None as group, the same on one device."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiTConfig, BlockCache, MochiPipeline, load_lora, load_transformer, sample
from mochi_core.parallel.decode import decode_together
from mochi_core.parallel.plan import Plan
from mochi_core.parallel.team import Members
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.sampling.block_cache import CachedBlocks
from mochi_core.sampling.given import Given
from mochi_core.transformer.offload import stream_blocks
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.random_inputs import SIGMAS, inputs, prompt
from tests.harness.tiny_models import TEXT_WIDTH, random_dit, random_vae

# As many heads as Mochi, which Ulysses distributes.
HEADS_24 = AsymmDiTConfig(
    depth=3, hidden_size_x=192, hidden_size_y=96, num_heads=24, text_width=TEXT_WIDTH, mlp_size_x=256, mlp_size_y=128
)


@functools.cache
def model():
    return random_dit(HEADS_24)


@torch.no_grad()
def denoise(group, plan, lengths, size, tokens=16, levels=None):
    """A velocity for prompts of these lengths, and the bytes that this member sent."""
    dit = model()
    latents, sigma, embeds, mask = inputs(lengths, size, tokens=tokens)
    if levels is not None:
        sigma = sigma[:, None] * torch.tensor(levels)
    text = dit.prepare_text(embeds, mask)
    members = group and Members.of(group, Plan.parse(plan))
    velocity = dit.denoise(
        latents,
        text,
        dit.modulation(sigma, text.pooled),
        dit.rope(latents.shape, latents.device),
        group=members and members.tokens,
    )
    return velocity, sent(members)


def sent(members):
    return members and members.guidance.sent + members.tokens.ulysses.sent + members.tokens.ring.sent


def run(group, plan, *, scales=4.5, cache=None, stop=None, dit=None, **options):
    """A whole run, and the cache's hits; member 0 stops it after step `stop`."""
    members = group and Members.of(group, Plan.parse(plan))
    cache = cache and BlockCache(*cache)
    steps = []

    def on_step(step, _):
        steps.append(step)
        return step == stop and (group is None or group.rank == 0)

    noise = torch.randn(1, 12, 3, 6, 10, generator=torch.Generator().manual_seed(7))
    video = sample(
        dit or model(),
        noise,
        SIGMAS,
        prompt(6),
        prompt(3, seed=1),
        scales,
        on_step if stop is not None else None,
        cache=cache,
        members=members,
        **options,
    )
    return video, cache and (cache.forwards, cache.hits), steps


def continue_a_clip(group, plan):
    """Latents of a video that begins with a clip, which every member but the first encodes slightly differently."""
    clip = (
        torch.rand(7, 32, 48, 3, generator=torch.Generator().manual_seed(9)) / 2 + (group.rank if group else 0) / 1000
    )
    embeds, mask = prompt(6)
    return MochiPipeline(model(), random_vae(), None, parallel=group and plan)(
        prompt_embeds=embeds, prompt_attention_mask=mask, video=clip, height=32, width=48, num_frames=13,
        num_inference_steps=3, output_type="latent",
    )  # fmt: skip


def run_with_a_bent_decision(group, plan):
    """A run in which member 1 considers every change large."""
    skips = CachedBlocks._skips
    if group.rank == 1:
        CachedBlocks._skips = lambda self, state, signal: skips(self, state, signal) and False
    try:
        return run(group, plan, cache=("teacache", 0.3))
    finally:
        CachedBlocks._skips = skips


def run_with_own_scales(group, plan):
    return run(group, plan, scales=4.5 + group.rank)


def run_with_own_given_frames(group, plan, level):
    """A run with given frames: frame 0 is equal on all members; frame 1, with this level, and the unused frame 2 are not."""
    latents = torch.full((1, 12, 3, 6, 10), 1.0 + group.rank)
    latents[:, :, 0] = 1
    return run(group, plan, given=Given(latents, torch.tensor([0.0, level, 1.0]), held=True))


def decode(group, latents, memory_limit=None):
    """The video, and the bytes that this member sent."""
    vae = random_vae()
    if group is None:
        return vae.decode(latents), 0
    return decode_together(vae, latents, group, memory_limit), group.sent


def run_in_form(group, plan, folder, form, **options):
    """A run with a LoRA, quantised weights, streamed or compiled blocks; the files are from `write_forms`."""
    kind = form if form in QUANTIZERS else None
    dit = load_transformer(folder / "dit.safetensors", torch.float32, quantize=kind)
    if form == "lora":
        load_lora(dit, folder / "lora.safetensors", 0.8)
    if form == "compiled":
        dit.compile_blocks(backend="eager")
    with stream_blocks(dit, "cpu") if form == "streamed" else nullcontext():
        return run(group, plan, dit=dit, **options)


def write_forms(folder):
    save_file(model().state_dict(), folder / "dit.safetensors")
    write_adapter(folder / "lora.safetensors", random_adapter(model().state_dict(), "qkv_x", "mlp_x.w2"), "comfyui")
