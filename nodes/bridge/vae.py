"""AsymmVAE as the host's VAE."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...mochi_core import AsymmVAE
from ...mochi_core.autoencoder.latents import latents_problem
from ...mochi_core.autoencoder.memory import decoder_memory_estimate, encoder_memory_estimate
from ...mochi_core.autoencoder.plan import GIB, MemoryEstimate
from ...mochi_core.autoencoder.streaming import strip_step
from ...mochi_core.checkpoints import check_fit, empty_vae, merge
from ...mochi_core.dtypes import dtype_name
from ...mochi_core.geometry import (
    LATENT_CHANNELS,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    frames_to_latents,
    latents_to_frames,
)
from .choices import arithmetic_choice, log_choice, stored_name, weights_choice
from .quantized import by_layer, read_part

WORKING_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# In latents; the host's own autoencoder needs tiles to fit at all, and a large overlap to hide the seams.
HOST_TILES = {"tile_x": 32, "tile_y": 32, "overlap": 8, "tile_t": 8, "overlap_t": 2}


class HostAsymmVAE(AsymmVAE):
    """The autoencoder under the host's calling convention. It streams even if the host asks for tiles."""

    comfy_has_chunked_io = True

    def __init__(self, config, *, dtype: torch.dtype, **options) -> None:
        super().__init__(config, dtype=dtype, **options)
        self.compute_dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype used for computing: the host may keep weights in their file's dtype and cast them for every product."""
        return self.compute_dtype

    def decode_output_shape(self, shape):
        self.check_decoder(shape)
        return self.decoded_shape(shape)

    def decode(self, latents, output_buffer=None, memory_limit=None):
        """Decode latents on the working device into `output_buffer`, not clamped; reports progress and can be cancelled."""
        if output_buffer is None:
            output_buffer = torch.empty(self.decoded_shape(latents.shape), device=mm.intermediate_device())
        limit = free_or_evictable_memory(latents.device) if memory_limit is None else memory_limit
        self._log_plan(latents, limit, "are free" if memory_limit is None else "are allowed")
        return super().decode(latents, limit, host_progress(), out=output_buffer, device=latents.device)

    def _log_plan(self, latents, limit, reason) -> None:
        self.check_decoder(latents.shape)
        estimate = decoder_memory_estimate(self.config, latents.shape[-2], latents.shape[-1], self.dtype.itemsize)
        plan = estimate.choose_plan(limit, latents.device)
        apart = "" if plan.cache_device == plan.device else ", and caches in main memory"
        needs = f"{estimate.peak_bytes(plan) / GIB:.2f} GiB on {plan.device}{apart}"
        log_choice("decode", needs, f"{limit / GIB:.2f} GiB {reason}")

    def encode(self, pixels, device=None):
        """Encode float32 pixels (B, 3, F, H, W) in [0, 1], on any device, to the mean of their latents."""
        device = device or pixels.device
        return super().encode(pixels, free_or_evictable_memory(device), host_progress(), device).mean

    def encoder_steps(self, encoder):
        """The core's steps after one that scales the host's pixels, so that no scaled copy of the whole clip is needed."""
        return [strip_step(lambda pixels: pixels * 2 - 1), *super().encoder_steps(encoder)]

    # The host falls back to these when it runs out of memory.

    def decode_tiled(self, latents, **_):
        return self.decode(latents)

    def encode_tiled(self, pixels, **_):
        return self.encode(pixels, pixels.device)


def free_or_evictable_memory(device: torch.device) -> int:
    """Bytes that are free, or held by weights that the host frees on demand."""
    evictable = 0
    if comfy.memory_management.aimdo_enabled:
        import comfy_aimdo.model_vbar  # present only if the host manages memory dynamically

        evictable = comfy_aimdo.model_vbar.vbars_analyze(device.index if device.type == "cuda" else None)
    free: Any = mm.get_free_memory(device)  # a single number unless `torch_free_too` is set
    return free + evictable


def host_progress():
    """Progress of the running node; every call also checks for cancellation."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        if (done, total) != (bar.current, bar.total):
            bar.update_absolute(done, total)

    return report


class HostVAE(comfy.sd.VAE):
    """The host's VAE around our module. The host's constructor detects models from weights, so it is not called."""

    def __init__(self, module: HostAsymmVAE, device: torch.device, *, disable_dynamic: bool = False) -> None:
        self.first_stage_model = module
        self.device, self.output_device = device, mm.intermediate_device()
        # Pixels and latents are passed in float32: the Fourier features need unrounded pixels.
        self.vae_dtype = torch.float32
        self.working_dtypes = WORKING_DTYPES
        self.latent_channels, self.latent_dim, self.output_channels = module.config.latent_channels, 3, 3
        time, space = TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION
        self.upscale_ratio = (lambda t: max(0, latents_to_frames(t)), space, space)
        self.downscale_ratio = (lambda f: max(0, (f + time - 1) // time), space, space)
        self.upscale_index_formula = self.downscale_index_formula = (time, space, space)
        self.process_input = lambda image: image  # the module scales it: see encoder_steps
        self.process_output = lambda image: image.mul_(0.5).add_(0.5).clamp_(0, 1)
        self.handles_tiling = self.crop_input = True
        self.disable_offload = self.not_video = False
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.audio_sample_rate = 44100
        # Looked up late: the host replaces CoreModelPatcher at start-up if it manages memory dynamically.
        patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = patcher(module, load_device=device, offload_device=mm.vae_offload_device())
        self.model_size()

    def vae_encode_crop_pixels(self, pixels):
        """The part of IMAGE frames ([B,] F, H, W, C) that is encoded; the host's own crops only height and width, not length."""
        return crop_frames(checked_frames(pixels))[..., : self.output_channels]

    def decode(self, samples_in, vae_options={}):  # noqa: B006 - the host's signature
        self.first_stage_model.check_decoder(samples_in.shape)  # before the host asks how much memory it needs
        return super().decode(samples_in, vae_options)

    def decode_tiled(self, samples, *_, **__):
        return self.decode(samples)

    def encode_tiled(self, pixel_samples, *_, **__):
        return self.encode(pixel_samples)

    def memory_used_decode(self, shape, _dtype) -> int:
        """Bytes that the fastest plan for latents (B, 12, T, H, W) uses; the videos of a batch are decoded one after another."""
        module, (height, width) = self.first_stage_model, shape[-2:]
        return self._fastest(
            module.decoder, decoder_memory_estimate(module.config, height, width, module.dtype.itemsize)
        )

    def memory_used_encode(self, shape, _dtype) -> int:
        """Bytes that the fastest plan for pixels (B, 3, F, H, W) uses; the videos of a batch are encoded one after another."""
        module, (frames, height, width) = self.first_stage_model, shape[-3:]
        estimate = encoder_memory_estimate(module.config, frames, height, width, module.dtype.itemsize)
        return self._fastest(module.encoder, estimate)

    def _fastest(self, half: torch.nn.Module | None, estimate: MemoryEstimate) -> int:
        if half is None:
            return 1  # the host asks before the module can say what is missing
        return estimate.peak_bytes(estimate.choose_plan(sys.maxsize, self.device))


def load_vae(paths: list[str], dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> HostVAE:
    """A VAE from one file, or from separate encoder and decoder files, in any known layout.

    Raises:
        ValueError: the files are not a Mochi autoencoder or halves of one.
    """
    checkpoint = merge([read_part(path, "vae") for path in paths])
    expected = empty_vae(checkpoint)
    check_fit(dict(expected.named_parameters()), checkpoint)
    device = mm.vae_device()
    chosen = dtype or mm.vae_dtype(device, WORKING_DTYPES)
    module = HostAsymmVAE(
        expected.config,
        ops=comfy.ops.disable_weight_init,
        device=mm.vae_offload_device(),
        dtype=chosen,
        encoder=expected.encoder is not None,
        decoder=expected.decoder is not None,
    )
    mm.archive_model_dtypes(module)
    vae = HostVAE(module.eval().requires_grad_(False), device, disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (paths, dtype))
    for layer, part in by_layer(checkpoint.tensors):
        state = {key.removeprefix(layer + "."): tensor.read() for key, tensor in part.items()}
        module.get_submodule(layer).load_state_dict(state, assign=vae.patcher.is_dynamic())
    weights = weights_choice(stored_name(checkpoint), dtype_name(chosen), dtype is not None, device)
    log_choice("VAE", weights, arithmetic_choice(chosen, device))
    return vae


def load_vae_patcher(paths: list[str], dtype: torch.dtype | None, disable_dynamic: bool = False):
    """The patcher of a VAE loaded again; the host calls this for another device."""
    return load_vae(paths, dtype, disable_dynamic).patcher


def decode_video(vae: comfy.sd.VAE, latents: torch.Tensor, memory_limit: int | None) -> torch.Tensor:
    """Latents to IMAGE frames: streamed through our autoencoder, or tiled through the host's.

    `memory_limit` is in bytes, not counting the weights; None uses what is free.

    Raises:
        ValueError: the VAE is not Mochi's, or the latents are not.
    """
    require_mochi_vae(vae)
    if isinstance(vae, HostVAE):
        if memory_limit is not None:
            vae, ask = copy.copy(vae), vae.memory_used_decode
            vae.memory_used_decode = lambda shape, _dtype: min(ask(shape, _dtype), memory_limit)
        video = vae.decode(latents, vae_options={"memory_limit": memory_limit})
    elif problem := latents_problem(latents):
        raise ValueError(problem)
    else:
        video = vae.decode_tiled(latents, **HOST_TILES)
    return video.flatten(0, 1)


def encode_frames(vae: comfy.sd.VAE, pixels: torch.Tensor) -> torch.Tensor:
    """IMAGE frames (F, H, W, C) of any length and size to latents (1, 12, T, H / 8, W / 8), by our autoencoder or the host's."""
    require_mochi_vae(vae)
    return vae.encode(pixels if isinstance(vae, HostVAE) else crop_frames(checked_frames(pixels)))


def checked_frames(pixels: torch.Tensor) -> torch.Tensor:
    """`pixels`; ValueError unless they are frames ([B,] F, H, W, C) of finite values: any other would spoil the whole video."""
    if pixels.ndim not in (4, 5):
        raise ValueError(f"The frames have shape {(*pixels.shape,)}; they have to be (frames, height, width, 3).")
    if pixels.numel() and not all(map(math.isfinite, pixels.aminmax())):
        raise ValueError(
            "The frames hold values that are infinite or not a number, which would spoil the whole video; regenerate them."
        )
    return pixels


def crop_frames(pixels: torch.Tensor) -> torch.Tensor:
    """The first 6k + 1 frames of `pixels` ([B,] F, H, W, C), centre-cropped to multiples of 8 pixels as by the host.

    Raises:
        ValueError: there is not enough for a single latent.
    """
    frames, *size = pixels.shape[-4:-1]
    height, width = (length // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION for length in size)
    kept = latents_to_frames(frames_to_latents(frames))
    if min(kept, height, width) < 1:
        raise ValueError(
            f"There are {frames} frames of {size[1]} x {size[0]} pixels to encode, but a latent is made of at least one of "
            f"{SPATIAL_COMPRESSION} x {SPATIAL_COMPRESSION}; connect a larger video."
        )
    top, left = ((length % SPATIAL_COMPRESSION) // 2 for length in size)
    if (kept, height, width) != (frames, *size):
        given, taken = f"{frames} frames of {size[1]} x {size[0]}", f"{kept} (6k + 1) of {width} x {height}"
        log_choice("encode", f"{given} given, {taken} encoded")
    return pixels[..., :kept, top : top + height, left : left + width, :]


def require_mochi_vae(vae: comfy.sd.VAE) -> None:
    """Raise a ValueError if `vae` cannot be Mochi's."""
    if vae.first_stage_model is None or vae.latent_channels != LATENT_CHANNELS or vae.latent_dim != 3:
        raise ValueError(
            "This VAE is not Mochi's (12 channels, video); load mochi_vae.safetensors with Load Mochi VAE."
        )
