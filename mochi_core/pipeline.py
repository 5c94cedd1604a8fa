"""Prompt to video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .autoencoder.latents import denormalize_latents
from .autoencoder.model import AsymmVAE
from .geometry import VideoSize
from .io.video import to_unit_range
from .sampling.block_cache import BlockCache
from .sampling.sample import OnStep, sample
from .sampling.schedule import linear_quadratic_schedule
from .text_encoder import TextEncoder
from .transformer.model import AsymmDiT
from .transformer.offload import offload_modulation, stream_blocks

OUTPUT_TYPES = ("np", "pt", "latent")
OFFLOADS = (False, True, "stream")


class MochiPipeline:
    """The three models of Mochi, run one after the other.

    Without `offload`, each model works where it is. With it, the models stay on the CPU and only the one at work is on
    `device`, the denoiser by `offload.offload_modulation`. With "stream", the denoiser has only two of its blocks on `device`,
    by `offload.stream_blocks`, and the text encoder works on the CPU.

    Raises:
        ValueError: `offload` without `device`, or another way to offload.
    """

    def __init__(
        self,
        dit: AsymmDiT,
        vae: AsymmVAE,
        text_encoder: TextEncoder,
        *,
        offload: bool | Literal["stream"] = False,
        device: torch.device | str | None = None,
        attention: str = "auto",
    ) -> None:
        """`attention` is one of `attention.ATTENTIONS`; "auto" is the fastest exact one for the device."""
        if offload not in OFFLOADS:
            raise ValueError(f"offload is {offload!r}; use one of {', '.join(map(repr, OFFLOADS))}.")
        if offload and device is None:
            raise ValueError(f"offload={offload!r} needs device=..., the device on which the models take turns.")
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder
        # Where `device` is the CPU, whole models are there already: a copy of the denoiser's weights would only take memory.
        moves = offload == "stream" or (offload and torch.device(device or "cpu").type != "cpu")
        self.work_device = device if moves else None
        self.offload_context = stream_blocks if offload == "stream" else offload_modulation
        self.attention = attention

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        height: int = 480,
        width: int = 848,
        num_frames: int = 85,
        num_inference_steps: int = 64,
        guidance_scale: float | Sequence[float] = 4.5,
        seed: int = 0,
        latents: Tensor | None = None,
        output_type: str = "np",
        sigmas: Tensor | None = None,
        on_step: OnStep | None = None,
        cache: BlockCache | None = None,
    ) -> Any:
        """Make one video per prompt.

        Args:
            prompt, negative_prompt: one string, or one per video; an empty negative prompt means no text at all.
            height, width: pixels, multiples of 16.
            num_frames: 6k + 1, played at 30 frames per second.
            guidance_scale: one number, or one per step; a step with 1 costs one forward instead of two.
            seed: of the noise, which is made on the CPU: the same seed gives the same video on every device.
            latents: (B, 12, T, H, W) starting noise in DiT space, instead of `seed`.
            output_type: "np" for float32 (B, F, H, W, 3) in [0, 1], "pt" for a (B, F, 3, H, W) tensor in [0, 1], "latent"
                for VAE-space latents (B, 12, T, H, W).
            sigmas: noise levels, instead of the linear-quadratic schedule of `num_inference_steps`.
            on_step: called as on_step(step, latents) after each step; returning True stops the run.
            cache: skips blocks where little changes, see `block_cache`.

        Returns:
            The videos, as `output_type` says.

        Raises:
            ValueError: a size that Mochi cannot make, or arguments that do not fit together.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        shape = VideoSize(height, width, num_frames).latent_shape(len(prompts))
        noise = initial_noise(shape, seed) if latents is None else latents
        if noise.shape != shape:
            raise ValueError(f"latents have shape {tuple(noise.shape)}; this size and number of prompts need {shape}.")
        if sigmas is None:
            sigmas = linear_quadratic_schedule(num_inference_steps)

        with self._working(self.text_encoder):
            cond = self.text_encoder.encode(prompts)
            uncond = self.text_encoder.encode(negative_prompt)
        with self._working(self.dit):
            denoised = sample(
                self.dit, noise, sigmas, cond, uncond, guidance_scale, on_step, attention=self.attention, cache=cache
            )
        denoised = denormalize_latents(denoised)
        return denoised if output_type == "latent" else self._decode(denoised, output_type)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        with self._working(self.vae):
            video = to_unit_range(self.vae.decode(latents))
        if output_type == "pt":
            return video.transpose(1, 2)
        return video.permute(0, 2, 3, 4, 1).cpu().numpy()

    @contextmanager
    def _working(self, model: AsymmDiT | AsymmVAE | TextEncoder) -> Iterator[None]:
        """Have `model` on the working device for the duration, if the pipeline offloads."""
        if self.work_device is None:
            yield
            return
        model.to("cpu")  # it may have been given on another device
        try:
            if isinstance(model, AsymmDiT):
                with self.offload_context(model, self.work_device):
                    yield
            elif isinstance(model, TextEncoder) and self.offload_context is stream_blocks:
                yield  # a device that needs streaming has no room for it
            else:
                model.to(self.work_device)
                yield
        finally:
            model.to("cpu")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise from a generator of its own on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
