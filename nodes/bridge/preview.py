"""Animated previews of the video during sampling."""

from __future__ import annotations

import logging
import time
from io import BytesIO

import comfy.latent_formats
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

from ...mochi_core.autoencoder.tiny import TinyDecoder
from ...mochi_core.checkpoints import load_tiny_vae
from ...mochi_core.geometry import FPS, TEMPORAL_COMPRESSION
from ...mochi_core.shown import sentence

MAX_TIME_FRACTION = 0.01
"""Fraction of the sampling time that making previews may take."""
WEBP_QUALITY = 70
SHOWN_SIDE = 128
"""Approximate longer side, in pixels, to which smaller previews are enlarged; 106 x 60, from 848 x 480, stays as it is."""
TINY_FILES = "taem1"
"""Prefix of the names of the tiny autoencoder's files."""
CALLBACK_ARGUMENT = 5
"""Position of the callback among the arguments of the host's `outer_sample`."""


class MochiLatents(comfy.latent_formats.Mochi):
    """The host's latent format without `latent_rgb_factors`, with which the host would show the first frame only."""

    def __init__(self) -> None:
        super().__init__()
        self.preview_factors, self.latent_rgb_factors = self.latent_rgb_factors, None


class AnimatedPreview:
    """An animated WebP with an image's `save`, the only method that the host calls."""

    def __init__(self, frames: torch.Tensor) -> None:
        """`frames` (T, H, W, 3) uint8 on the CPU, one per latent frame."""
        first, *others = [Image.fromarray(frame.numpy()) for frame in frames]
        file = BytesIO()
        first.save(
            file, "WEBP", save_all=True, append_images=others, duration=_durations(len(frames)), loop=0,
            quality=WEBP_QUALITY, method=0,
        )  # fmt: skip
        self.content = file.getvalue()

    def save(self, file, **_) -> None:
        """Write the WebP whatever format the host asks for: browsers detect it from the content."""
        file.write(self.content)


def _durations(count: int) -> list[int]:
    """Milliseconds for each of `count` latent frames: the first stands for one frame of the video, every other for six."""
    return [1000 // FPS, *[1000 * TEMPORAL_COMPRESSION // FPS] * (count - 1)]


def latents_to_rgb(latents: torch.Tensor, latent_format: MochiLatents) -> torch.Tensor:
    """The first video of latents (B, 12, T, H, W) as frames (T, H, W, 3), uint8 on the CPU, by a linear fit."""
    factors = torch.tensor(latent_format.preview_factors, dtype=latents.dtype, device=latents.device)  # (12, 3)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias, dtype=latents.dtype, device=latents.device)
    pixels = torch.einsum("cthw,cr->thwr", latents[0], factors) + bias  # (T, H, W, 3) in [-1, 1]
    return ((pixels + 1) * 127.5).clamp(0, 255).to("cpu", torch.uint8)


def decoded_frames(latents: torch.Tensor, decoder: TinyDecoder) -> torch.Tensor:
    """The first video of latents (B, 12, T, H, W) in DiT space as frames (T, 4 * H, 4 * W, 3), uint8 on the CPU."""
    halved = (torch.nn.functional.avg_pool2d(frame.float(), 2) for frame in decoder.last_frames(latents[0]))
    return torch.stack([(f.permute(1, 2, 0) * 255).round_().clamp_(0, 255).to("cpu", torch.uint8) for f in halved])


def enlarged(frames: torch.Tensor) -> torch.Tensor:
    """Small frames (T, H, W, 3) with every pixel enlarged to a square, so that a node shows more than a dot."""
    factor = max(1, round(SHOWN_SIDE / max(frames.shape[1:3])))
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def tiny_decoder(device: torch.device) -> TinyDecoder | None:
    """TAEM1 from models/vae_approx, if there is one and the server's preview method is taesd."""
    if args.preview_method != LatentPreviewMethod.TAESD:
        return None
    names = (name for name in folder_paths.get_filename_list("vae_approx") if name.lower().startswith(TINY_FILES))
    path = folder_paths.get_full_path("vae_approx", next(names, ""))
    if path is None:
        return None
    try:
        return load_tiny_vae(path, torch.float32 if device.type == "cpu" else torch.float16, device)
    except Exception as error:  # including out of memory: see `Previewer.show`
        logging.warning("Mochi preview: %s The linear fit is shown.", sentence(error))
        return None


class Previewer:
    """Sends a preview after a step, as long as previews take at most 1 % of the time in total."""

    def __init__(self, latent_format: MochiLatents, decoder: TinyDecoder | None = None) -> None:
        """With a `decoder`, frames are decoded; otherwise they are a linear fit to the latents."""
        self.latent_format, self.decoder = latent_format, decoder
        self.started, self.spent = time.perf_counter(), 0.0
        self.failed = False

    def show(self, step: int, denoised: torch.Tensor, total: int) -> None:
        """Send a preview of `denoised` (B, 12, T, H, W), latents in DiT space, after `step` of `total` steps.

        If one cannot be made, for example for lack of memory, the next are simpler or left out; nothing is raised.
        """
        if self.failed or self.spent > MAX_TIME_FRACTION * (time.perf_counter() - self.started):
            return
        try:
            preview = self._make(denoised)
        except Exception as error:  # of any kind: the video matters more than its preview
            follows = "The linear fit is shown." if self.decoder is not None else "There will be no more in this run."
            logging.warning("Mochi preview: %s %s", sentence(error), follows)
            self.failed, self.decoder = self.decoder is None, None
            return
        comfy.utils.ProgressBar(total).update_absolute(step + 1, total, ("WEBP", preview, None))

    def _make(self, denoised: torch.Tensor) -> AnimatedPreview:
        frames = latents_to_rgb(denoised, self.latent_format)
        # The copy above waits for the device to finish the step, which is not a cost of the preview.
        start = time.perf_counter()
        if self.decoder is not None:
            frames = decoded_frames(denoised, self.decoder)
        preview = AnimatedPreview(enlarged(frames))
        self.spent += time.perf_counter() - start
        return preview


def with_previews(executor, *arguments, **named):
    """Wraps the host's sampling: calls the caller's callback as before, then sends the preview."""
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        return executor(*arguments, **named)
    callback = arguments[CALLBACK_ARGUMENT]
    patcher = executor.class_obj.model_patcher
    previewer = Previewer(patcher.model.latent_format, tiny_decoder(patcher.load_device))

    def show(step, denoised, x, total):
        if callback is not None:
            callback(step, denoised, x, total)
        previewer.show(step, denoised, total)

    return executor(*arguments[:CALLBACK_ARGUMENT], show, *arguments[CALLBACK_ARGUMENT + 1 :], **named)
