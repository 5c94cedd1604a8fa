"""AsymmVAE as the host's VAE."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...mochi_core import AsymmVAE
from ...mochi_core.checkpoints import (
    blaming,
    check_tensors,
    has_decoder,
    has_encoder,
    joined,
    vae_config,
)
from ...mochi_core.geometry import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, latents_to_frames
from ...mochi_core.vae import FRAMES_AT_ONCE, fourier_features
from ...mochi_core.video import to_unit_range
from .quantized import read_part

WORKING_DTYPES = [torch.bfloat16, torch.float32]
# Values held at once for each pixel of a frame: convolution caches of all stages, then per frame at work.
CACHED_PER_PIXEL, WORKING_PER_PIXEL = 3300, 4 * 128
ENCODED_PER_PIXEL = 400
# In latents; the host's own autoencoder needs tiles to fit at all, and generous ones to hide their seams.
HOST_TILES = {"tile_x": 32, "tile_y": 32, "overlap": 8, "tile_t": 8, "overlap_t": 2}


class HostAsymmVAE(AsymmVAE):
    """The autoencoder under the host's calling convention: it streams, and tiles only by not needing to."""

    def decode(self, latents, *, frames_at_once: int = FRAMES_AT_ONCE):
        """Latents on the working device to video on the host's output device, with progress and cancel."""
        self.check_decoder(latents)
        total = latents_to_frames(latents.shape[2])
        progress, pieces = comfy.utils.ProgressBar(total), []
        for piece in self.decoder.stream(latents.to(self.dtype), frames_at_once):
            mm.throw_exception_if_processing_interrupted()
            pieces.append(piece.to(mm.intermediate_device()))
            progress.update(piece.shape[2])
        return torch.cat(pieces, dim=2)

    def encode(self, pixels):
        """Float32 pixels in [-1, 1], (B, 3, F, H, W), to the mean of their latents."""
        self.check_encoder(pixels)
        mean, _ = self.encoder(fourier_features(pixels).to(self.dtype))
        return mean

    def decode_tiled(self, latents, **_):
        return self.decode(latents)

    def encode_tiled(self, pixels, **_):
        return self.encode(pixels)


class HostVAE(comfy.sd.VAE):
    """The host's VAE around our module. Its own constructor detects models from weights, so it is not called."""

    def __init__(self, module: HostAsymmVAE, device: torch.device) -> None:
        self.first_stage_model = module
        self.device, self.output_device = device, mm.intermediate_device()
        # Pixels and latents are handed over in float32: the Fourier features need unrounded pixels.
        self.vae_dtype = torch.float32
        self.working_dtypes = WORKING_DTYPES
        self.latent_channels, self.latent_dim, self.output_channels = module.config.latent_channels, 3, 3
        time, space = TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION
        self.upscale_ratio = (lambda t: max(0, latents_to_frames(t)), space, space)
        self.downscale_ratio = (lambda f: max(0, (f + time - 1) // time), space, space)
        self.upscale_index_formula = self.downscale_index_formula = (time, space, space)
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.copy_(to_unit_range(image))
        self.memory_used_decode, self.memory_used_encode = self._decode_bytes, self._encode_bytes
        self.handles_tiling = self.crop_input = True
        self.disable_offload = self.not_video = False
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.audio_sample_rate = 44100
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            module, load_device=device, offload_device=mm.vae_offload_device()
        )
        self.model_size()

    def _decode_bytes(self, shape, _dtype) -> int:
        """For latents (B, 12, T, H, W): independent of T, because decoding streams."""
        values = CACHED_PER_PIXEL + FRAMES_AT_ONCE * WORKING_PER_PIXEL
        pixels = shape[0] * shape[-2] * shape[-1] * SPATIAL_COMPRESSION**2
        return pixels * values * self.first_stage_model.dtype.itemsize

    def _encode_bytes(self, shape, _dtype) -> int:
        """For pixels (B, 3, F, H, W)."""
        pixels = shape[0] * shape[-3] * shape[-2] * shape[-1]
        return pixels * ENCODED_PER_PIXEL * self.first_stage_model.dtype.itemsize


def load_vae(paths: list[str], dtype: torch.dtype | None = None) -> HostVAE:
    """A VAE from one file, or from separate encoder and decoder files, in any known layout.

    Raises:
        ValueError: the files are no Mochi autoencoder or halves of one.
    """
    name = " and ".join(Path(path).name for path in paths)
    tensors = joined([read_part(path, "vae") for path in paths], name)
    device = mm.vae_device()
    if dtype is None:
        dtype = mm.vae_dtype(device, WORKING_DTYPES)
    halves = {"encoder": has_encoder(tensors), "decoder": has_decoder(tensors)}
    with blaming(name):
        config = vae_config(tensors)
        expected = AsymmVAE(config, device="meta", **halves)
    check_tensors(expected, tensors, name)
    module = HostAsymmVAE(
        config, ops=comfy.ops.disable_weight_init, device=mm.vae_offload_device(), dtype=dtype, **halves
    )
    mm.archive_model_dtypes(module)
    vae = HostVAE(module.eval().requires_grad_(False), device)
    weights = {key: tensor.read() for key, tensor in tensors.items()}
    module.load_state_dict(weights, assign=vae.patcher.is_dynamic())
    return vae


def decode_video(vae: comfy.sd.VAE, latents: torch.Tensor, frames_at_once: int) -> torch.Tensor:
    """Latents to IMAGE frames: streamed through our autoencoder, or in the host's tiles through the host's."""
    require_mochi_vae(vae)
    if isinstance(vae, HostVAE):
        video = vae.decode(latents, vae_options={"frames_at_once": frames_at_once})
    else:
        video = vae.decode_tiled(latents, **HOST_TILES)
    return video.flatten(0, 1)


def require_mochi_vae(vae: comfy.sd.VAE) -> None:
    """Raise a ValueError if `vae` cannot be Mochi's."""
    if vae.first_stage_model is None or vae.latent_channels != 12 or vae.latent_dim != 3:
        raise ValueError(
            "This VAE is not Mochi's (12 channels, video); load mochi_vae.safetensors with Load Mochi VAE."
        )
