"""Weight files: open (`formats`), recognise and rename (`names`), load, convert and inspect."""

from .formats.reader import open_checkpoint
from .loading import (
    check_fit,
    checked_when_read,
    empty_transformer,
    empty_vae,
    is_finite,
    load_into,
    load_tiny_vae,
    load_transformer,
    load_vae,
    open_part,
)
from .names.detect import describe, has_frame_levels, select_part
from .names.diffusers import autoencoder_rules, to_canonical, to_diffusers, transformer_rules
from .names.quantized import is_block_matrix, quantize_block_matrices
from .names.sizes import dit_config, vae_config
from .tensors import Checkpoint, LazyStateDict, LazyTensor, from_state_dict, merge

__all__ = [
    "Checkpoint",
    "LazyStateDict",
    "LazyTensor",
    "autoencoder_rules",
    "check_fit",
    "checked_when_read",
    "describe",
    "dit_config",
    "empty_transformer",
    "empty_vae",
    "from_state_dict",
    "has_frame_levels",
    "is_block_matrix",
    "is_finite",
    "load_into",
    "load_tiny_vae",
    "load_transformer",
    "load_vae",
    "merge",
    "open_checkpoint",
    "open_part",
    "quantize_block_matrices",
    "select_part",
    "to_canonical",
    "to_diffusers",
    "transformer_rules",
    "vae_config",
]
