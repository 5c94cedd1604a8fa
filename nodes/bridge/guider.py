"""Guidance that changes from step to step, and CFG-Zero*."""

from __future__ import annotations

import comfy.model_patcher
import comfy.samplers

from ...mochi_core.sampling.guidance import ZERO_INIT, projection
from ...mochi_core.sampling.schedule import guidance_schedule, in_step_range
from .sampling import step_at


class ScheduledGuider(comfy.samplers.CFGGuider):
    """The host's guider with one guidance scale per step; a step with scale 1 costs one forward instead of two."""

    cfg_zero = False
    """Whether guidance is CFG-Zero*."""

    def set_schedule(self, scale: float, end_scale: float | None, start: float, end: float) -> None:
        """Set the arguments of `guidance_schedule`, which raises a ValueError if they make no valid schedule."""
        guidance_schedule(1, scale, end_scale, start, end)
        self.set_cfg(scale)
        self.schedule = scale, end_scale, start, end

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - the host's signature
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        scales = guidance_schedule(len(sigmas) - 1, *self.schedule)
        step = step_at(sigmas, timestep)
        if self.cfg_zero:
            if in_step_range(step, len(scales), 0, ZERO_INIT):
                return x  # no velocity
            options = comfy.model_patcher.create_model_options_clone(model_options)
            model_options = comfy.model_patcher.set_model_options_post_cfg_function(options, scaled_to_projection)
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds.get("negative"), self.conds.get("positive"),
            scales[step], model_options=model_options, seed=seed,
        )  # fmt: skip


def scaled_to_projection(given: dict):
    """CFG-Zero*'s correction of the host's guided prediction: uncond scaled to the projection of cond onto it, as velocities.

    The host predicts the video; x minus the video is the velocity times the noise level.
    """
    if given["uncond_denoised"] is None:  # a step without guidance
        return given["denoised"]
    cond, uncond = (given["input"] - given[name] for name in ("cond_denoised", "uncond_denoised"))
    return given["denoised"] - (projection(cond, uncond) - 1) * (1 - given["cond_scale"]) * uncond


def make_guider(
    model, positive, negative, cfg: float, cfg_end: float, start: float, end: float, cfg_zero: bool = False
) -> ScheduledGuider:
    """A GUIDER with scale `cfg`, moving to `cfg_end` unless that is 0, from fraction `start` to `end` of the steps."""
    guider = ScheduledGuider(model)
    guider.cfg_zero = cfg_zero
    guider.set_conds(positive, negative)
    guider.set_schedule(cfg, cfg_end or None, start, end)
    return guider
