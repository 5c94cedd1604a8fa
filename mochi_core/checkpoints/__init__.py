"""Read, recognise, convert and load weight files."""

from .formats.reader import open_tensors
from .loading import (
    check_finite,
    check_tensors,
    empty_transformer,
    empty_vae,
    is_finite,
    joined,
    load_into,
    load_transformer,
    load_vae,
)
from .names.detect import (
    blaming,
    describe,
    dit_config,
    file_label,
    find_part,
    has_decoder,
    has_encoder,
    open_part,
    vae_config,
)
from .names.diffusers import autoencoder_rules, to_canonical, to_diffusers, transformer_rules
from .names.quantized import is_large, quantize_large
from .tensors import Checkpoint, LazyStateDict, LazyTensor, from_state_dict

__all__ = [
    "Checkpoint",
    "LazyStateDict",
    "LazyTensor",
    "autoencoder_rules",
    "blaming",
    "check_finite",
    "check_tensors",
    "describe",
    "dit_config",
    "empty_transformer",
    "empty_vae",
    "file_label",
    "find_part",
    "from_state_dict",
    "has_decoder",
    "has_encoder",
    "is_finite",
    "is_large",
    "joined",
    "load_into",
    "load_transformer",
    "load_vae",
    "open_part",
    "open_tensors",
    "quantize_large",
    "to_canonical",
    "to_diffusers",
    "transformer_rules",
    "vae_config",
]
