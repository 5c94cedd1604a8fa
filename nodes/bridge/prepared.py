"""What does not depend on the latents, computed once for a sampling run of the host's: text, modulation, rotary table.

`with_run` puts a `Run` into the options that the host makes for one run, and that are gone after it, finished or not.
`prepared` asks it before every call of the denoiser, outside of what may be compiled. Prompts are told apart by their values,
so it does not matter how the host batches, windows or repeats them. Noise levels outside of the run's schedule are computed
on the spot; so is everything where hooks change the layers that this comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...mochi_core import AsymmDiT
from ...mochi_core.transformer.model import Modulation, Text
from ...mochi_core.transformer.rope import Rope

OPTION = "mochi_run"
LEVELS = 64
"""Noise levels at a time; of one prompt they take 113 MB in bf16."""
BATCHES = 8
"""Of prompts, that are kept."""
SOURCES = {"pos_frequencies", "t_embedder", "t5_y_embedder", "t5_yproj", "mod_x", "mod_y", "mod"}
"""Parts of the names of all weights that this is computed from."""


@dataclass(frozen=True)
class Conditioning:
    """All arguments of `AsymmDiT.denoise` besides the latents."""

    text: Text
    modulation: Modulation
    rope: Rope


def conditioning_of(
    network: AsymmDiT, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None
) -> Conditioning:
    """Computed on the spot; `x` (B, 12, T, H, W), `timestep` = sigma (B,), `context` (B, L, width), `mask` (B, L)."""
    text = network.prepare_text(context, full_mask(context, mask).bool())
    return Conditioning(text, network.modulation(timestep, text.pooled), network.rope(x.shape, x.device))


class Prompts:
    """A batch of prompts, and the modulation for some levels of the schedule."""

    def __init__(
        self, network: AsymmDiT, context: Tensor, mask: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`context` and `mask` may wait on another device."""
        self.network, self.context, self.mask = network, context, mask
        self.text = network.prepare_text(context.to(device, dtype), mask.to(device).bool())
        self.levels: list[float] = []

    def are(self, context: Tensor, mask: Tensor) -> bool:
        pairs = (self.context, context), (self.mask, mask)
        return all(ours.device == theirs.device and torch.equal(ours, theirs) for ours, theirs in pairs)

    def modulation(self, timestep: Tensor, schedule: list[float]) -> Modulation:
        level, *others = set(timestep.tolist())
        if others or level not in schedule:
            return self.network.modulation(timestep, self.text.pooled)
        if level not in self.levels:
            first = schedule.index(level)
            self.levels = schedule[first : first + LEVELS]
            levels = torch.tensor(self.levels, device=timestep.device)
            self.schedule = self.network.modulation(levels[:, None], self.text.pooled)
        return self.schedule.at(self.levels.index(level))


class Preparation:
    """What a run has prepared for one network; on several devices there is one each."""

    def __init__(self, network: AsymmDiT, schedule: list[float], dtype: torch.dtype) -> None:
        self.network, self.schedule, self.dtype = network, schedule, dtype
        self.prompts: list[Prompts] = []
        self.shape: torch.Size | None = None

    def conditioning(self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Conditioning:
        prompts = next((known for known in self.prompts if known.are(context, mask)), None)
        if prompts is None:
            prompts = Prompts(self.network, context, mask, x.device, self.dtype)
            self.prompts = [prompts, *self.prompts[: BATCHES - 1]]
        if self.shape != x.shape[2:]:
            self.shape, self.rope = x.shape[2:], self.network.rope(x.shape, x.device)
        return Conditioning(prompts.text, prompts.modulation(timestep, self.schedule), self.rope)


class Run:
    """One run of a sampler."""

    def __init__(self, schedule: list[float]) -> None:
        self.schedule = schedule
        self.preparations: dict[AsymmDiT, Preparation] = {}

    def preparation(self, network: AsymmDiT, dtype: torch.dtype) -> Preparation:
        return self.preparations.setdefault(network, Preparation(network, self.schedule, dtype))


def with_run(executor, guider, sigmas, extra_args, *arguments, **named):
    """Wraps a run of the host's sampler."""
    if not _changed_by_hooks(guider.model_patcher):
        levels = guider.inner_model.model_sampling.timestep(sigmas[:-1]).float()
        extra_args["model_options"]["transformer_options"][OPTION] = Run(levels.tolist())
    return executor(guider, sigmas, extra_args, *arguments, **named)


def _changed_by_hooks(patcher) -> bool:
    keys = {key for patches in patcher.hook_patches.values() for key in patches}
    return any(SOURCES & set(key.split(".")) for key in keys)


def prepared(model, x: Tensor, t: Tensor, context: Tensor | None, mask: Tensor | None, options: dict):
    """What the run that `options` belong to has for a call of the host's model, or None; arguments as the host has them."""
    run: Run | None = options.get(OPTION)
    if run is None or context is None:
        return None
    preparation = run.preparation(model.diffusion_model, model.get_dtype_inference())
    timestep = model.model_sampling.timestep(t).float()
    return preparation.conditioning(x, timestep, context, full_mask(context, mask))


def full_mask(context: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) for `context` (B, L, width): all tokens count where the prompt does not say."""
    return context.new_ones(context.shape[:2]) if mask is None else mask
