"""Sampling through the host, so that its previews, patches, offloading and cancel work."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...mochi_core import VideoSize, linear_quadratic_schedule

SIGMA_TOLERANCE = 1e-6
"""Largest relative difference of noise levels that counts as rounding."""


def make_sigmas(steps: int, denoise: float, threshold_noise: float = 0.025, linear_steps: int = 0) -> torch.Tensor:
    """Linear-quadratic noise levels (steps + 1,); with `denoise` < 1, the last `steps` steps of a proportionally longer schedule.

    `linear_steps` 0 means half of the steps.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}, but it is a share of the schedule; use a value above 0 and up to 1.")
    total = max(steps, int(steps / denoise))
    return linear_quadratic_schedule(total, threshold_noise, linear_steps or None)[-(steps + 1) :]


def step_at(sigmas: torch.Tensor, sigma: torch.Tensor) -> int:
    """The step of the schedule `sigmas` (steps + 1,) to which the noise level `sigma` (B,) belongs.

    Samplers also ask for noise levels between those of the schedule. Schedules that lead from a video back to noise rise.
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
        ValueError: Mochi cannot make that size; names the nearest that it can.
    """
    shape = VideoSize(height, width, num_frames).latent_shape(batch_size)
    return {"samples": torch.zeros(shape, device=mm.intermediate_device())}


def sample(model, positive, negative, latent: dict, sigmas: torch.Tensor, cfg: float, seed: int) -> dict:
    """Euler steps along `sigmas`; returns a LATENT like `latent`."""
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": samples}
