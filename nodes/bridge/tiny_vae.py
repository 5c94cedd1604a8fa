"""TAEM1, a tiny autoencoder, as the host's VAE: decodes in preview quality."""

from __future__ import annotations

from math import prod
from typing import Any

import comfy.model_management as mm
import comfy.ops
import torch

from ...mochi_core.autoencoder.latents import shape_problem
from ...mochi_core.autoencoder.tiny import TinyDecoder
from ...mochi_core.checkpoints import check_fit, open_checkpoint
from ...mochi_core.checkpoints.names.detect import find_parts
from ...mochi_core.dtypes import dtype_name
from .choices import arithmetic_choice, log_choice, stored_name, weights_choice
from .quantized import by_layer, read_part
from .vae import WORKING_DTYPES, HostVAE, host_progress

COPIES = 6
"""Number of tensors of the largest size held at once in a decode: input, past, their concatenation and its results."""


class HostTinyDecoder(TinyDecoder):
    """The decoder under the host's calling convention."""

    comfy_has_chunked_io = True
    encoder = None

    def check_decoder(self, shape) -> None:
        if problem := shape_problem(shape):
            raise ValueError(problem)

    def decode_output_shape(self, shape):
        return self.decoded_shape(shape)

    def decode(self, latents, output_buffer=None, memory_limit=None):  # noqa: ARG002 - it decodes one latent frame at a time
        """Decode latents on the working device into `output_buffer`, in [-1, 1] as the host expects it, not clamped."""
        video = super().decode(latents, host_progress()).mul_(2).sub_(1)
        if output_buffer is None:
            return video.to(mm.intermediate_device())
        return output_buffer.copy_(video)

    def encode(self, *_, **__):
        raise ValueError("The tiny autoencoder only decodes; load mochi_vae.safetensors to encode a video.")


class HostTinyVAE(HostVAE):
    """The host's VAE around the tiny decoder."""

    def memory_used_decode(self, shape, _dtype) -> int:
        """Bytes for latents (B, 12, T, H, W): some copies of six frames in the last layer's width, and the videos in float32."""
        module, latent_pixels = self.first_stage_model, prod(shape[-2:])
        widest = COPIES * 6 * module.config.decoder_channels[-1] * next(module.parameters()).element_size()
        return 8 * 8 * latent_pixels * widest + 4 * prod(module.decoded_shape(shape))

    def memory_used_encode(self, *_) -> int:
        return 1


def is_tiny_vae(path: str) -> bool:
    return "tiny_vae" in find_parts(open_checkpoint(path))


def load_tiny_vae(path: str, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> HostTinyVAE:
    """A decode-only VAE from a TAEM1 file.

    Raises:
        ValueError: the file is not a complete TAEM1.
    """
    checkpoint, device = read_part(path, "tiny_vae"), mm.vae_device()
    chosen = dtype or mm.vae_dtype(device, WORKING_DTYPES)
    module: Any = HostTinyDecoder(ops=comfy.ops.disable_weight_init, device=mm.vae_offload_device(), dtype=chosen)
    check_fit(dict(module.named_parameters()), checkpoint)
    mm.archive_model_dtypes(module)
    vae = HostTinyVAE(module.eval().requires_grad_(False), device, disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (load_tiny_patcher, (path, dtype))
    for layer, part in by_layer(checkpoint.tensors):
        state = {key.removeprefix(layer + "."): tensor.read().to(chosen) for key, tensor in part.items()}
        module.get_submodule(layer).load_state_dict(state)
    weights = weights_choice(stored_name(checkpoint), dtype_name(chosen), dtype is not None, device)
    log_choice("VAE", "TAEM1, whose videos are previews of what Mochi's autoencoder makes", weights)
    log_choice("VAE", arithmetic_choice(chosen, device))
    return vae


def load_tiny_patcher(path: str, dtype: torch.dtype | None, disable_dynamic: bool = False):
    """The patcher of a VAE loaded again; the host calls this for another device."""
    return load_tiny_vae(path, dtype, disable_dynamic).patcher
