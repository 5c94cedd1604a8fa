"""Sampling through the host, so that its previews, patches, offloading and cancelling work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...mochi_core import VideoSize, linear_quadratic_schedule
from ...mochi_core.autoencoder.latents import latents_problem
from ...mochi_core.sampling.schedule import check_guidance, check_schedule

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Keys of an empty LATENT made for another model with other latent sizes: pixels and frames per latent."""
SIGMA_TOLERANCE = 1e-6
"""Largest relative difference between noise levels that counts as rounding."""


def make_sigmas(steps: int, denoise: float, threshold_noise: float = 0.025, linear_steps: int = 0) -> torch.Tensor:
    """Linear-quadratic noise levels (steps + 1,); if `denoise` < 1, the last `steps` steps of a proportionally longer schedule.

    `linear_steps` 0 means half of the steps.

    Raises:
        ValueError: `denoise` is out of range, or the numbers make no valid schedule.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}, but it is a share of the schedule; use a value above 0 and up to 1.")
    total = max(steps, int(steps / denoise))
    return linear_quadratic_schedule(total, threshold_noise, linear_steps or None)[-(steps + 1) :]


def step_at(sigmas: torch.Tensor, sigma: torch.Tensor) -> int:
    """The step of the schedule `sigmas` (steps + 1,) to which the noise level `sigma` (B,) belongs.

    Samplers also evaluate noise levels between those of the schedule. Schedules from a video back to noise rise.
    """
    starts, level = sigmas[:-1], sigma[0]
    rising = sigmas[0] < sigmas[-1]
    reached = (
        (starts <= level * (1 + SIGMA_TOLERANCE) if rising else starts >= level * (1 - SIGMA_TOLERANCE)).sum().item()
    )
    return max(0, int(reached) - 1)


def empty_latent(width: int, height: int, num_frames: int, batch_size: int) -> dict:
    """A LATENT of zeros.

    Raises:
        ValueError: Mochi cannot make that size; the message names the nearest that it can.
    """
    shape = VideoSize(height, width, num_frames).latent_shape(batch_size)
    return {"samples": torch.zeros(shape, device=mm.intermediate_device())}


def sample(model, positive, negative, latent: dict, sigmas: torch.Tensor, cfg: float, seed: int, sampler=None) -> dict:
    """Sample along `sigmas` with Euler steps or a SAMPLER; returns a LATENT like `latent`.

    Raises:
        ValueError: the LATENT is not Mochi's, its mask is invalid, there is no step, or a number is not finite.
    """
    check_schedule(sigmas)
    check_guidance("cfg", cfg)
    image, mask = mochi_latents(model, latent), noise_mask(latent)
    noise: Any = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))  # the host's hint allows several
    # Needed here because only MODELs from our loader wrap it; others would end in infinities if a schedule rises to 1.
    with unscaled_noise(model.get_model_object("model_sampling"), noise):
        samples = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            sampler or comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            image,
            noise_mask=mask,
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    return {**without_sizes(latent), "samples": samples}


@contextmanager
def unscaled_noise(sampling, brought: torch.Tensor) -> Iterator[None]:
    """Make a run of the host's leave latents at noise level 1 as they are: no part of a video is left to scale by.

    The host divides the result of a run by 1 - sigma, and multiplies by it where the next run starts without noise. `sampling` is
    the model's, or another node's replacement; `brought` is the noise of the run, to which other wrappers may add noise for the
    parts that a mask keeps.
    """
    begin, end = sampling.noise_scaling, sampling.inverse_noise_scaling
    goes_on = not brought.any()

    def noise_scaling(sigma, noise, latent_image, max_denoise=False):
        scaled = begin(sigma, noise, latent_image, max_denoise)
        # Elementwise, so that nothing waits for the device: with a mask, this is called at every step.
        return torch.where((sigma >= 1) & (noise == 0), latent_image, scaled) if goes_on else scaled

    own, before = vars(sampling), dict(vars(sampling))
    sampling.noise_scaling = noise_scaling
    sampling.inverse_noise_scaling = lambda sigma, latent: latent if sigma >= 1 else end(sigma, latent)
    try:
        yield
    finally:
        for name in ("noise_scaling", "inverse_noise_scaling"):  # the class's, unless this run is inside another
            own.pop(name)
            own.update({name: before[name]} if name in before else {})


def noise_mask(latent: dict) -> torch.Tensor | None:
    """The part of a LATENT to regenerate, or None if it has no mask; see `checked_mask`."""
    return checked_mask(latent["noise_mask"]) if latent.get("noise_mask") is not None else None


def checked_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask (..., H, W) in float32, from 0 (kept) to 1 (regenerated).

    Raises:
        ValueError: it is empty, or has values that are not finite.
    """
    if mask.ndim < 2 or not mask.numel():
        raise ValueError(
            f"The mask has shape {(*mask.shape,)}; it has to be (frames, height, width), at least one of each."
        )
    if not mask.isfinite().all():
        raise ValueError("The mask has values that are infinite or not a number; use 0 (kept) to 1 (regenerated).")
    return mask.float().clamp(0, 1)


def without_sizes(latent: dict) -> dict:
    """A LATENT without the keys that mark its sizes as another model's."""
    return {key: value for key, value in latent.items() if key not in RATIOS}


def mochi_latents(model, latent: dict) -> torch.Tensor:
    """The samples of a LATENT (B, 12, T, H, W); empty ones made for another model get the channels and sizes of `model`.

    Raises:
        ValueError: they are another model's, have no frames or rows, or hold values that are not finite.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError("The LATENT holds several tensors, as for models of video with sound; connect one of Mochi's.")
    if samples.ndim > 3 and samples.numel():  # the host has its own errors for others
        samples = comfy.sample.fix_empty_latent_channels(model, samples, *(latent.get(key) for key in RATIOS))
    if problem := latents_problem(samples):
        raise ValueError(problem)
    return samples
