"""Editing through the host: FlowEdit as a guider with its own sampler, inversion and RF editing as samplers for any guider.

These samplers start from the LATENT itself, the video or its inverted noise, whatever noise the run passes in. The core's
velocities are derived from the host's predictions of the clean video: (denoised - x) / sigma.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...mochi_core.sampling.edit import check_rising, flow_edit, fresh_noise, invert, pulls, rf_edit
from ...mochi_core.sampling.guidance import Velocity
from ...mochi_core.sampling.schedule import check_falling, check_guidance, schedule_below
from .sampling import mochi_latents, noise_mask, unscaled_noise, without_sizes

SOURCE, TARGET = "source", "target"
SMALLEST_LEVEL = 1e-4
"""Noise level used in place of 0, where the velocity cannot be derived from the host's prediction."""


def with_unscaled_noise(executor, guider, sigmas, extra_args, callback, noise, *arguments, **named):
    """Wraps a run of the host's sampler, outside the wrappers that change its noise."""
    with unscaled_noise(guider.inner_model.model_sampling, noise):
        return executor(guider, sigmas, extra_args, callback, noise, *arguments, **named)


class InversionSampler(comfy.samplers.KSAMPLER):
    """A sampler that ends at noise; works with a MODEL from any loader."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *arguments, **named):
        with unscaled_noise(model_wrap.inner_model.model_sampling, noise):
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *arguments, **named)


class EditGuider(comfy.samplers.CFGGuider):
    """Guided predictions for two prompts: the video's and the edited video's."""

    def set_prompts(self, source, target, negative, source_cfg: float, cfg: float) -> None:
        # Two entries for the negative prompt, so that a cache keeps them apart.
        self.inner_set_conds({SOURCE: source, TARGET: target, "from " + SOURCE: negative, "from " + TARGET: negative})
        self.scales = {SOURCE: source_cfg, TARGET: cfg}
        self.set_cfg(cfg)
        self.asked = TARGET

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - the host's signature
        positive, negative = self.conds[self.asked], self.conds["from " + self.asked]
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            negative,
            positive,
            self.scales[self.asked],
            model_options=model_options,
            seed=seed,
        )


def edit_video(
    model, source, target, negative, latent: dict, steps: int, start: float, scales: tuple[float, float], seed: int
):
    """A LATENT like `latent`, edited by FlowEdit from noise level `start`; `scales` are the guidance scales of source and target.

    With equal prompts and scales the samples are returned bit for bit, as they always are outside the noise mask.

    Raises:
        ValueError: the LATENT is empty or not Mochi's, or a number is out of range.
    """
    for name, scale in zip(("source_cfg", "cfg"), scales, strict=True):
        check_guidance(name, scale)
    sigmas = schedule_below(start, steps)
    samples = mochi_latents(model, latent)
    if not samples.any():
        raise ValueError("The LATENT is empty, and there is nothing to edit; connect VAE Encode (Mochi) with a video.")
    guider = EditGuider(model)
    guider.set_prompts(source, target, negative, *scales)
    mask = noise_mask(latent)
    mask = None if mask is None else comfy.sampler_helpers.prepare_mask(mask, samples.shape, model.load_device)
    sampler = comfy.samplers.KSAMPLER(_flow_edit_sampler(guider, fresh_noise(samples, seed), mask))
    edited = guider.sample(
        torch.zeros_like(samples),
        samples,
        sampler,
        sigmas,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    # The unedited samples take the same way into the denoiser's space and back, so that rounding cancels out.
    base = model.model
    unedited = base.process_latent_out(base.process_latent_in(samples.float()))
    moved = edited.to(unedited) - unedited
    return {**without_sizes(latent), "samples": samples + moved}


def _flow_edit_sampler(guider: EditGuider, noise: Callable[[], Tensor], mask: Tensor | None):
    """FlowEdit with this guider, as a sampler function of the host's."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):  # noqa: ARG001 - the host's signature
        clean = model.latent_image

        def asking(prompt: str, velocity: Velocity) -> Velocity:
            def asked(latents: Tensor, step: int) -> Tensor:
                guider.asked = prompt
                return velocity(latents, step) if mask is None else mask * velocity(latents, step)

            return asked

        velocity = velocity_of(model, sigmas, extra_args)
        source, target = (asking(prompt, velocity) for prompt in (SOURCE, TARGET))
        return flow_edit(source, target, clean, sigmas, noise, reporting(callback, sigmas))

    return sample


def velocity_of(model, sigmas: Tensor, extra_args: dict | None) -> Velocity:
    """Predictions of the host's model, a KSamplerX0Inpaint, at the levels of `sigmas` (steps + 1,), as the core's velocity."""

    def velocity(latents: Tensor, step: int) -> Tensor:
        sigma = sigmas[step].clamp(min=SMALLEST_LEVEL)
        denoised = model(latents, sigma.expand(len(latents)), **(extra_args or {}))
        return (denoised - latents) / sigma

    return velocity


def reporting(callback, sigmas: Tensor):
    """The host's step callback, with the signature that the core calls."""

    def on_step(step: int, latents: Tensor) -> None:
        if callback is not None:
            sigma = sigmas[step]
            callback({"i": step, "x": latents, "denoised": latents, "sigma": sigma, "sigma_hat": sigma})

    return on_step


def inversion_sampler(gamma: float, seed: int) -> comfy.samplers.KSAMPLER:
    """A SAMPLER from a video to noise along rising sigmas, see `invert`; `seed` makes the noise that gamma pulls towards."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma:g}, but it goes from 0 (follows the model) to 1 (straight to noise).")

    def mochi_invert(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):  # noqa: ARG001 - the host's signature
        check_rising(sigmas)
        if not model.latent_image.any():
            raise ValueError(
                "The LATENT is empty, and there is nothing to invert; connect VAE Encode (Mochi) with a video."
            )
        velocity = velocity_of(model, sigmas, extra_args)
        noise = fresh_noise(x, seed)() if gamma else None
        return invert(velocity, model.latent_image, sigmas, gamma, noise, reporting(callback, sigmas))

    return InversionSampler(mochi_invert)


def rf_edit_sampler(latent: dict, eta: float, start: float, end: float, trend: str, steps: tuple[int, int]):
    """A SAMPLER that goes from inverted noise to a video pulled towards `latent`, see `rf_edit`.

    `steps` is a range of steps that replaces the noise levels `start` and `end`; it is ignored if it ends at 0.

    Raises:
        ValueError: see `pulls`; while sampling, if the sigmas do not fall or the video has another size.
    """
    if steps[1]:
        start, end = 1.0, 0.0
    pulls(torch.tensor([1.0, 0.0]), eta, start, end, trend)

    def mochi_rf_edit(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):  # noqa: ARG001 - the host's signature
        check_falling(sigmas)
        guider: Any = model.inner_model
        given = mochi_latents(guider.model_patcher, latent)
        if given.shape != x.shape:
            raise ValueError(
                f"Mochi RF Edit has a LATENT {(*given.shape,)} but makes {(*x.shape,)}; connect the video that was inverted."
            )
        clean = guider.inner_model.process_latent_in(given.to(x))
        window = levels_of_steps(sigmas, steps) if steps[1] else (start, end)
        velocity, etas = velocity_of(model, sigmas, extra_args), pulls(sigmas, eta, *window, trend)
        begin = model.latent_image if sigmas[0] >= 1 else (1 - sigmas[0]) * model.latent_image
        return rf_edit(velocity, begin, clean, sigmas, etas, reporting(callback, sigmas))

    return comfy.samplers.KSAMPLER(mochi_rf_edit)


def levels_of_steps(sigmas: Tensor, steps: tuple[int, int]) -> tuple[float, float]:
    """The noise levels of the first and the last of the steps from steps[0] up to, not including, steps[1]."""
    levels = sigmas[:-1][slice(*steps)].clamp(max=1).tolist() or [0.0]
    start, end = levels[0], levels[-1]
    logging.info("Mochi RF Edit: steps %d to %d are start %.4f and end %.4f.", *steps, start, end)
    return start, end
