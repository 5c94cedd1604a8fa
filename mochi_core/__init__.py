"""Mochi 1, self-contained: denoiser, autoencoder, text encoder, sampling and checkpoints."""

# ruff: noqa: E402 - PyTorch takes seconds
from . import interrupts, packages

interrupts.end_at_once()
packages.check()

from .autoencoder.latents import denormalize_latents, normalize_latents
from .autoencoder.model import AsymmVAE, Posterior
from .checkpoints import load_transformer, load_vae
from .config import AsymmDiTConfig, AsymmVAEConfig
from .geometry import VideoSize, seconds_to_frames
from .io.video import save_video
from .lora import Lora, fuse_loras, load_lora
from .pipeline import MochiPipeline
from .sampling.block_cache import BlockCache
from .sampling.guidance import Guidance, guided
from .sampling.sample import euler, sample
from .sampling.schedule import guidance_schedule, linear_quadratic_schedule
from .text_encoder import TextEncoder, load_text_encoder
from .transformer.attention import Attention, sdpa
from .transformer.model import AsymmDiT

__all__ = [
    "AsymmDiT",
    "AsymmDiTConfig",
    "AsymmVAE",
    "AsymmVAEConfig",
    "Attention",
    "BlockCache",
    "Guidance",
    "Lora",
    "MochiPipeline",
    "Posterior",
    "TextEncoder",
    "VideoSize",
    "denormalize_latents",
    "euler",
    "fuse_loras",
    "guidance_schedule",
    "guided",
    "linear_quadratic_schedule",
    "load_lora",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "normalize_latents",
    "sample",
    "save_video",
    "sdpa",
    "seconds_to_frames",
]
