"""Model configurations. The defaults are the released Mochi 1; any other sizes work the same way."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TEXT_TOKENS = 256
"""Prompt length in T5 tokens, as in Genmo's pipeline: MAX_T5_TOKEN_LENGTH in genmoai/mochi, mochi_preview/pipelines.py."""


@dataclass(frozen=True)
class AsymmDiTConfig:
    """Shape of the denoiser. `_x` is the visual stream, `_y` the text stream."""

    depth: int = 48
    hidden_size_x: int = 3072
    hidden_size_y: int = 1536
    num_heads: int = 24
    in_channels: int = 12
    patch_size: int = 2
    text_width: int = 4096
    pool_heads: int = 8
    mlp_size_x: int = 8192
    mlp_size_y: int = 4096
    timestep_features: int = 256

    @property
    def head_dim(self) -> int:
        return self.hidden_size_x // self.num_heads


@dataclass(frozen=True)
class AsymmVAEConfig:
    """Shape of the autoencoder; the defaults are the release's (genmoai/mochi, src/genmo/mochi_preview/vae/models.py).

    Decoder entries go from the latents to the pixels, encoder entries from the pixels to the latents. `*_blocks` counts
    residual blocks: before, inside and after the resampling stages. `encoder_attention` says for the same five places
    whether each residual block is followed by causal temporal attention.
    """

    latent_channels: int = 12
    decoder_channels: tuple[int, ...] = (768, 512, 256, 128)
    decoder_blocks: tuple[int, ...] = (3, 6, 4, 3, 3)
    temporal_expansions: tuple[int, ...] = (3, 2, 1)
    spatial_expansions: tuple[int, ...] = (2, 2, 2)
    encoder_channels: tuple[int, ...] = (64, 128, 256, 384)
    encoder_blocks: tuple[int, ...] = (3, 3, 4, 6, 3)
    encoder_attention: tuple[bool, ...] = (False, True, True, True, True)
    temporal_reductions: tuple[int, ...] = (1, 2, 3)
    spatial_reductions: tuple[int, ...] = (2, 2, 2)
    attention_head_dim: int = 32


@dataclass(frozen=True)
class TinyVAEConfig:
    """Shape of the tiny autoencoder's decoder; the defaults are TAEM1's (madebyollin/taem1, taem1.py)."""

    latent_channels: int = 12
    decoder_channels: tuple[int, ...] = (256, 128, 64, 64)
    """From latents to pixels: one per stage, then the width before the last convolution."""
    temporal_expansions: tuple[int, ...] = (1, 2, 3)
    blocks: int = 3
    """Memory blocks per stage."""


@dataclass(frozen=True)
class T5EncoderConfig:
    """Shape of the text encoder, T5 v1.1."""

    depth: int = 24
    width: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    mlp_size: int = 10240
    vocabulary: int = 32128
    position_buckets: int = 32
