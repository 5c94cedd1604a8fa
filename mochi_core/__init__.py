"""Mochi 1, self-contained: denoiser, autoencoder, text encoder, sampling and checkpoints."""

from .attention import Attention, sdpa
from .cache import BlockCache
from .checkpoints import load_transformer, load_vae
from .config import AsymmDiTConfig, AsymmVAEConfig
from .dit import AsymmDiT
from .geometry import VideoSize, seconds_to_frames
from .latents import denormalize_latents, normalize_latents
from .lora import Lora
from .pipeline import MochiPipeline
from .sample import euler, guided, sample
from .schedule import guidance_schedule, linear_quadratic_schedule
from .text_encoder import TextEncoder, load_text_encoder
from .vae import AsymmVAE, Posterior
from .video import save_video

__all__ = [
    "AsymmDiT",
    "AsymmDiTConfig",
    "AsymmVAE",
    "AsymmVAEConfig",
    "Attention",
    "BlockCache",
    "Lora",
    "MochiPipeline",
    "Posterior",
    "TextEncoder",
    "VideoSize",
    "denormalize_latents",
    "euler",
    "guidance_schedule",
    "guided",
    "linear_quadratic_schedule",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "normalize_latents",
    "sample",
    "save_video",
    "sdpa",
    "seconds_to_frames",
]
