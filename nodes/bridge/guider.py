"""Guidance that changes from step to step."""

from __future__ import annotations

import comfy.samplers

from ...mochi_core.sampling.schedule import guidance_schedule
from .sampling import step_at


class ScheduledGuider(comfy.samplers.CFGGuider):
    """The host's guider with one guidance scale per step; a step with scale 1 costs one forward instead of two."""

    def set_schedule(self, scale: float, end_scale: float | None, start: float, end: float) -> None:
        """Set the arguments of `guidance_schedule`, which raises a ValueError for those that make no schedule."""
        guidance_schedule(1, scale, end_scale, start, end)
        self.set_cfg(scale)
        self.schedule = scale, end_scale, start, end

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - the host's signature
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        scales = guidance_schedule(len(sigmas) - 1, *self.schedule)
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds.get("negative"), self.conds.get("positive"),
            scales[step_at(sigmas, timestep)], model_options=model_options, seed=seed,
        )  # fmt: skip


def make_guider(model, positive, negative, cfg: float, cfg_end: float, start: float, end: float) -> ScheduledGuider:
    """A GUIDER whose scale is `cfg` from fraction `start` to `end` of the steps; or moves to `cfg_end`, unless that is 0."""
    guider = ScheduledGuider(model)
    guider.set_conds(positive, negative)
    guider.set_schedule(cfg, cfg_end or None, start, end)
    return guider
