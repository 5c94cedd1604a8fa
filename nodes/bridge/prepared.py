"""Text, modulation and rotary table, which do not depend on the latents, computed once per sampling run of the host's.

`with_run` puts a `SamplingRun` into the options that the host makes for one run and drops afterwards, even if it fails.
`prepared` queries it before every call of the denoiser, outside of what may be compiled. Prompts are identified by their values,
so it does not matter how the host batches, windows or repeats them. The modulation of noise levels outside the run's schedule is
computed for each call; so is everything if hooks change the weights that it depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...mochi_core import AsymmDiT
from ...mochi_core.sampling.given import frame_levels
from ...mochi_core.transformer.conditioning import Modulation, ScheduleModulation, TextConditioning
from ...mochi_core.transformer.rope import Rope
from .frame_levels import FrameLevels
from .patches import warn_of_patches_left_out

OPTION = "mochi_run"
SIGMA_CHUNK = 64
"""Number of noise levels whose modulation is computed and kept at a time; for one prompt it takes 113 MB in bf16."""
MAX_PROMPT_BATCHES = 8
"""Number of prompt batches that are kept."""
CONDITIONING_WEIGHTS = {"pos_frequencies", "t_embedder", "t5_y_embedder", "t5_yproj", "mod_x", "mod_y", "mod"}
"""Components of the names of all weights that the conditioning is computed from."""


@dataclass(frozen=True)
class Conditioning:
    """All inputs of `AsymmDiT.denoise` besides the latents."""

    text: TextConditioning
    modulation: Modulation
    rope: Rope

    def part(self, samples: slice, device: torch.device) -> Conditioning:
        """The arguments for some samples of the batch, on `device`."""

        def take(of_all: Tensor) -> Tensor:  # (B or 1, ...)
            return (of_all if len(of_all) == 1 else of_all[samples]).to(device)

        lengths = self.text.lengths[samples]
        tokens = take(self.text.tokens)[:, : max(lengths, default=0)]
        blocks = tuple((take(x), take(y)) for x, y in self.modulation.blocks)
        text = TextConditioning(tokens, lengths, take(self.text.pooled))
        return Conditioning(text, Modulation(blocks, take(self.modulation.final)), self.rope.to(device))


def conditioning_of(
    network: AsymmDiT, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None
) -> Conditioning:
    """Conditioning for one call.

    `x` (B, 12, T, H, W), `timestep` = sigma (B,) or (B, T), `context` (B, L, width), `mask` (B, L).
    """
    text = network.prepare_text(context, full_mask(context, mask).bool())
    return Conditioning(text, network.modulation(timestep, text.pooled), network.rope(x.shape, x.device))


class PreparedPrompts:
    """A batch of prompts prepared for the denoiser, and their modulation for some noise levels of the schedule."""

    def __init__(
        self, network: AsymmDiT, context: Tensor, mask: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`context` (B, L, width) and `mask` (B, L) may be on another device than `device`."""
        self.network, self.context, self.mask = network, context, mask
        self.text = network.prepare_text(context.to(device, dtype), mask.to(device).bool())
        self.sigmas: list[float] = []
        self.modulations: ScheduleModulation | None = None
        """The modulations at `sigmas`; per frame if `shares` is set."""
        self.shares: tuple[float, ...] | None = None
        """Share of the noise level in `sigmas` for each frame of `modulations`; None if all are equal."""

    def matches(self, context: Tensor, mask: Tensor) -> bool:
        """Whether these are the same prompts, on the same device."""
        pairs = (self.context, context), (self.mask, mask)
        return all(ours.device == theirs.device and torch.equal(ours, theirs) for ours, theirs in pairs)

    def modulation(self, timestep: Tensor, schedule: list[float], levels: FrameLevels | None) -> Modulation:
        """Modulation for `timestep` = sigma (B,); prepared along with the following levels if it is in `schedule`.

        If frames have their own `levels`, only the first ones requested are prepared: context windows have several.
        """
        sigma, *others = set(timestep.tolist())
        shares, *other_shares = [None] if levels is None else {*map(tuple, levels.shares.tolist())}
        known = self.modulations is None or shares == self.shares
        if others or other_shares or sigma not in schedule or not known:
            return self.network.modulation(timestep if levels is None else levels.sigma(timestep), self.text.pooled)
        if self.modulations is None or sigma not in self.sigmas:
            first = schedule.index(sigma)
            self.sigmas, self.shares = schedule[first : first + SIGMA_CHUNK], shares
            sigmas = torch.tensor(self.sigmas)
            by_frame = sigmas if shares is None else frame_levels(sigmas, torch.tensor(shares))
            self.modulations = self.network.schedule_modulation(by_frame, self.text.pooled)
        return self.modulations.at(self.sigmas.index(sigma))


class DeviceConditioning:
    """A run's prepared conditioning for the network on one device; every device has its own network."""

    def __init__(self, network: AsymmDiT, schedule: list[float], dtype: torch.dtype) -> None:
        self.network, self.schedule, self.dtype = network, schedule, dtype
        self.prompts: list[PreparedPrompts] = []
        self.rope: Rope | None = None
        self.shape: torch.Size | None = None
        """Axes T, H, W of the latents that `rope` is for."""

    def conditioning(
        self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor, levels: FrameLevels | None
    ) -> Conditioning:
        """Conditioning for one call, computed or reused; the arguments are those of `conditioning_of`."""
        prompts = next((known for known in self.prompts if known.matches(context, mask)), None)
        if prompts is None:
            prompts = PreparedPrompts(self.network, context, mask, x.device, self.dtype)
            self.prompts = [prompts, *self.prompts[: MAX_PROMPT_BATCHES - 1]]
        if self.rope is None or self.shape != x.shape[2:]:
            self.shape, self.rope = x.shape[2:], self.network.rope(x.shape, x.device)
        return Conditioning(prompts.text, prompts.modulation(timestep, self.schedule, levels), self.rope)


class SamplingRun:
    """The prepared conditioning of one sampling run along the noise levels `schedule`, on all devices.

    The host may call it from one thread per device; they share only `by_network`.
    """

    def __init__(self, schedule: list[float]) -> None:
        self.schedule = schedule
        self.by_network: dict[AsymmDiT, DeviceConditioning] = {}

    def for_network(self, network: AsymmDiT, dtype: torch.dtype) -> DeviceConditioning:
        return self.by_network.setdefault(network, DeviceConditioning(network, self.schedule, dtype))


def with_run(executor, guider, sigmas, extra_args, *arguments, **named):
    """Wraps a run of the host's sampler."""
    warn_of_patches_left_out(extra_args["model_options"]["transformer_options"])
    if not _changed_by_hooks(guider.model_patcher):
        extra_args["model_options"]["transformer_options"][OPTION] = SamplingRun(sigmas[:-1].float().tolist())
    return executor(guider, sigmas, extra_args, *arguments, **named)


def _changed_by_hooks(patcher) -> bool:
    keys = {key for patches in patcher.hook_patches.values() for key in patches}
    return any(CONDITIONING_WEIGHTS & set(key.split(".")) for key in keys)


def prepared(
    model, x: Tensor, t: Tensor, context: Tensor | None, mask: Tensor | None, options: dict, levels: FrameLevels | None
):
    """Conditioning for a call of the host's model from the run that `options` belong to, or None outside such a run.

    The arguments are those of the host's `apply_model`. Nothing is prepared if gradients are on: what one call computes belongs
    to a graph that the next could not backpropagate through again.
    """
    run: SamplingRun | None = options.get(OPTION)
    if run is None or context is None or torch.is_grad_enabled():
        return None
    of_device = run.for_network(model.diffusion_model, model.get_dtype_inference())
    return of_device.conditioning(x, t.float(), context, full_mask(context, mask), levels)


def full_mask(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mask (B, L) of the valid tokens of `context` (B, L, width); the given `mask` may be shorter, or missing.

    Tokens beyond the mask, which other nodes append, are valid if they are not zero: our T5 sets padding to zero.
    """
    known = context.new_zeros(len(context), 0) if mask is None else mask
    appended = context[:, known.shape[1] :].ne(0).any(dim=-1)
    return torch.cat((known, appended.to(known)), dim=1) if appended.shape[1] else known
