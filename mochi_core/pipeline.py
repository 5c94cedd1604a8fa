"""Prompt to video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .autoencoder.latents import denormalize_latents, normalize_latents
from .autoencoder.model import AsymmVAE, OnProgress
from .devices import check_device
from .geometry import KEEP_FRAMES, VideoSize
from .io.video import as_frames, as_images, to_unit_range
from .lora import NamedLoras
from .mapped_files import check_mapped_files
from .parallel.decode import decode_together
from .parallel.launch import join, peers
from .parallel.plan import Plan
from .parallel.team import Members, Team
from .sampling.block_cache import BlockCache
from .sampling.given import Given
from .sampling.guidance import PLAIN, Guidance
from .sampling.image_to_video import given_frames
from .sampling.sample import EncodedPrompts, OnStep, sample, scale_per_step
from .sampling.schedule import linear_quadratic_schedule
from .text_encoder import TextEncoder, empty_prompts
from .transformer.model import AsymmDiT
from .transformer.offload import offload_modulation, stream_blocks

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
OFFLOADS = (False, True, "stream")


class MochiPipeline(NamedLoras):
    """Mochi's three models, run in turn; the text encoder may be omitted if text is already encoded.

    LoRAs of the denoiser can be named, see `NamedLoras`.

    Without `offload`, each model runs where it is. With it, the models stay on the CPU and only the one in use is on `device`,
    the denoiser by `offload.offload_modulation`. With "stream", the denoiser has at most two of its blocks on `device`, by
    `offload.stream_blocks`, and the text encoder runs on the CPU.

    With `parallel`, the processes started by a launcher such as torchrun make each video together. All of them call the pipeline
    with the same arguments and get the videos; only the first needs a text encoder.

    Raises:
        ValueError: `offload` without `device`, or an unknown offload mode; a device that does not exist; `parallel` without a
            launcher, or a plan for another number of processes.
    """

    def __init__(
        self,
        dit: AsymmDiT,
        vae: AsymmVAE,
        text_encoder: TextEncoder | None,
        *,
        offload: bool | Literal["stream"] = False,
        device: torch.device | str | None = None,
        attention: str = "auto",
        parallel: Plan | str | None = None,
    ) -> None:
        """`attention` is one of `attention.ATTENTIONS`; "auto" is the fastest exact one for the device.

        `parallel` is a `Plan`, its text, such as "guidance=2,ulysses=4", or "auto" for one chosen for each video.
        """
        if offload not in OFFLOADS:
            raise ValueError(f"offload is {offload!r}; use one of {', '.join(map(repr, OFFLOADS))}.")
        if offload and device is None:
            raise ValueError(f"offload={offload!r} needs device=..., the device on which the models run in turn.")
        check_device("cpu" if device is None else device)
        if getattr(dit, "hf_device_map", None) and (offload or parallel):
            other, reason = ("parallel", "runs in one process") if parallel else ("offload", "stays on its devices")
            raise ValueError(f"device_map and {other} exclude each other: a split model {reason}.")
        super().__init__(dit)
        self.vae, self.text_encoder = vae, text_encoder
        # If `device` is the CPU, the models are already there: a copy of the denoiser's weights would only take memory.
        moves = offload == "stream" or (offload and torch.device(device or "cpu").type != "cpu")
        self.work_device = device if moves else None
        self.offload_context = stream_blocks if offload == "stream" else offload_modulation
        self.attention, self.team = attention, None
        if parallel is not None:
            works_on = dit.pos_frequencies.device if self.work_device is None else self.work_device
            self.team = Team(join(works_on), parallel, dit.config.num_heads, peers=peers())

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int = 480,
        width: int = 848,
        num_frames: int = 163,
        num_inference_steps: int = 64,
        guidance_scale: float | Sequence[float] = 4.5,
        seed: int = 0,
        latents: Tensor | None = None,
        output_type: str = "np",
        sigmas: Tensor | Sequence[float] | None = None,
        on_step: OnStep | None = None,
        cache: BlockCache | None = None,
        *,
        on_decode: OnProgress | None = None,
        guidance: Guidance = PLAIN,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        keep: int = KEEP_FRAMES,
        start_noise: float = 0.0,
        end_noise: float = 0.0,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> Any:
        """Make one or several videos per prompt.

        Args:
            prompt, negative_prompt: one string, or one per video; an empty negative prompt means no text at all.
            height, width: pixels, multiples of 16.
            num_frames: 6k + 1, played at 30 frames per second.
            guidance_scale: one number, or one per step; a step with 1 costs one forward pass instead of two.
            seed: of the noise, which is generated on the CPU, so that a seed gives the same video on every device.
            latents: (B, 12, T, H, W) starting noise in DiT space, instead of `seed`.
            output_type: "np" for float32 (B, F, H, W, 3) in [0, 1], "pt" for a (B, F, 3, H, W) tensor in [0, 1], "pil" for a
                list of images per video, "latent" for VAE-space latents (B, 12, T, H, W).
            sigmas: noise levels from 1 down to 0, instead of the linear-quadratic schedule of `num_inference_steps`.
            on_step: called as on_step(step, latents) after each step; returning True stops the run.
            on_decode: called often during decoding as on_decode(frames done, frames of all videos).
            cache: skips blocks when little changes, see `block_cache`.
            guidance: additions to classifier-free guidance, see `guidance`.
            image, last_image: frames that the video begins and ends with, see `as_frames`; resized and cropped to its size. A
                single last image is repeated for the 6 frames of one latent; several images are the end of a clip.
            video: frames to continue, instead of `image`; the new video begins with the last `keep` (6k + 1) of them.
            start_noise, end_noise: 0 keeps the given frames as they are, 1 regenerates them. If the weights do not support
                per-frame noise levels (`AsymmDiT.has_frame_levels`), the frames are held (temporal inpainting, see
                `sampling.given`).
            num_videos_per_prompt: videos per prompt, each with its own noise; those of one prompt are consecutive.
            prompt_embeds, prompt_attention_mask: features (B, L, width) and valid tokens (B, L) from `TextEncoder.encode`,
                instead of `prompt`; without a mask, all tokens are valid.
            negative_prompt_embeds, negative_prompt_attention_mask: the same, instead of `negative_prompt`.

        Returns:
            The videos, in the form given by `output_type`.

        Raises:
            ValueError: Mochi cannot make a video of this size, or arguments contradict each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}.")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}; use 1 or more.")
        if image is not None and video is not None:
            raise ValueError("image and video are both given; a video can only begin with one of them.")
        wanted = _given("prompt", prompt, prompt_embeds, prompt_attention_mask)
        size = VideoSize(height, width, num_frames)
        noise = _starting_noise(size.latent_shape(_count(wanted) * num_videos_per_prompt), seed, latents)
        if sigmas is None:
            sigmas = linear_quadratic_schedule(num_inference_steps)
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
        members = self._members(scale_per_step(guidance_scale, len(sigmas) - 1))

        unwanted = "" if negative_prompt is None else negative_prompt
        negative = _given("negative_prompt", unwanted, negative_prompt_embeds, negative_prompt_attention_mask)
        with self.working(self.text_encoder):
            cond, uncond = (
                _repeated(self._encoded(text, members), num_videos_per_prompt) for text in (wanted, negative)
            )
        start, levels = video if image is None else image, (start_noise, end_noise)
        given = self._given_frames(size, start, last_image, keep, levels, members)
        options = {"attention": self.attention, "cache": cache, "guidance": guidance}
        with self.working(self.dit):
            denoised = sample(
                self.dit, noise, sigmas, cond, uncond, guidance_scale, on_step, given=given, members=members, **options
            )
        denoised = denormalize_latents(denoised)
        return denoised if output_type == "latent" else self._decode(denoised, output_type, members, on_decode)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files: the first of several, or the only one."""
        return self.team is None or self.team.world.rank == 0

    def _members(self, scales: Sequence[float]) -> Members | None:
        return self.team and self.team.members(guided=any(scale != 1 for scale in scales))

    def _encoded(self, given: list[str] | EncodedPrompts, members: Members | None) -> EncodedPrompts:
        """The given text, encoded by the first member only."""
        if members is None or isinstance(given, tuple):
            return self._encoded_here(given)
        own = members.world.rank == 0
        embeds, mask = self._encoded_here(given) if own else empty_prompts(len(given), self.dit.config.text_width)
        embeds, mask = (members.world.broadcast(tensor.cpu().float()) for tensor in (embeds, mask))
        return embeds, mask.bool()

    def _encoded_here(self, given: list[str] | EncodedPrompts) -> EncodedPrompts:
        if isinstance(given, tuple):
            if (width := given[0].shape[2]) != self.dit.config.text_width:
                raise ValueError(
                    f"The text features have width {width}; this denoiser needs {self.dit.config.text_width}."
                )
            return given
        if self.text_encoder is not None:
            return self.text_encoder.encode(given)
        if any(given):
            raise ValueError(
                "This pipeline has no text encoder; pass prompt_embeds, or load one with load_text_encoder."
            )
        return empty_prompts(len(given), self.dit.config.text_width)

    def _given_frames(
        self, size: VideoSize, start: Any, end: Any, keep: int, noise: tuple[float, float], members: Members | None
    ) -> Given | None:
        """The frames given for the video, if any: `start` and `end` are as for `as_frames`, with the `noise` of each."""
        if start is None and end is None:
            return None
        first, last = (None if frames is None else as_frames(frames) for frames in (start, end))
        options = {"keep": keep, "start_noise": noise[0], "end_noise": noise[1], "held": not self.dit.has_frame_levels}
        with self.working(self.vae):
            given = given_frames(self.encode_frames, size, first, last, **options)
        if members is None:
            return given
        # Members may have encoded them slightly differently: rounding depends on the strips, and these on free memory.
        return replace(given, latents=members.world.broadcast(given.latents.cpu()))

    def encode_frames(self, frames: Tensor, on_progress: OnProgress | None = None) -> Tensor:
        """Frames (6k + 1, H, W, 3) in [0, 1] to DiT-space latents (1, 12, k + 1, H / 8, W / 8); see `AsymmVAE.encode`."""
        video = frames.movedim(-1, 0)[None] * 2 - 1
        return normalize_latents(self.vae.encode(video, on_progress=on_progress).mode().float())

    def _decode(
        self, latents: Tensor, output_type: str, members: Members | None, on_progress: OnProgress | None
    ) -> Any:
        with self.working(self.vae):
            if members is None:
                video = self.vae.decode(latents, on_progress=on_progress)
            else:
                video = decode_together(self.vae, latents, members.world, on_progress=on_progress)
        video = to_unit_range(video)
        if output_type == "pt":
            return video.transpose(1, 2)
        frames = video.permute(0, 2, 3, 4, 1).cpu().numpy()
        return [as_images(video) for video in frames] if output_type == "pil" else frames

    @contextmanager
    def working(self, model: AsymmDiT | AsymmVAE | TextEncoder | None) -> Iterator[None]:
        """Keep `model` on the working device for the duration, if the pipeline offloads."""
        if self.work_device is None or model is None:
            yield
            return
        check_mapped_files(model.model if isinstance(model, TextEncoder) else model)
        model.to("cpu")  # it may have been passed in on another device
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


def _given(
    name: str, prompt: str | Sequence[str] | None, embeds: Tensor | None, mask: Tensor | None
) -> list[str] | EncodedPrompts:
    """Resolve a prompt argument and its encoded form to texts, or to features and the mask of their valid tokens."""
    if embeds is not None:
        if prompt:
            raise ValueError(f"{name} and {name}_embeds are both given; pass one of them.")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if embeds.ndim != 3 or mask.shape != embeds.shape[:2]:
            shapes = f"{tuple(embeds.shape)} and {tuple(mask.shape)}"
            raise ValueError(f"{name}_embeds and its mask have shapes {shapes}; pass (B, L, width) and (B, L).")
        return embeds, mask.bool()
    if mask is not None:
        raise ValueError(f"{name}_attention_mask is for {name}_embeds, which are not given.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts:
        raise ValueError(f"There is no {name}; pass a string, or a list of one or more.")
    return prompts


def _count(given: list[str] | EncodedPrompts) -> int:
    return len(given[0]) if isinstance(given, tuple) else len(given)


def _repeated(encoded: EncodedPrompts, count: int) -> EncodedPrompts:
    """Repeat each of several prompts `count` times, consecutively; a single one applies to all videos as is."""
    embeds, mask = encoded
    return encoded if len(embeds) == 1 else (embeds.repeat_interleave(count, 0), mask.repeat_interleave(count, 0))


def _starting_noise(shape: tuple[int, ...], seed: int, latents: Tensor | None) -> Tensor:
    """The given `latents`, which must have this shape, or noise from `seed`."""
    if latents is None:
        return initial_noise(shape, seed)
    if latents.shape != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; this size and number of videos need {shape}.")
    return latents


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise from a separate CPU generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
