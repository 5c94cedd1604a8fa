"""LoRAs for the denoiser: files in every common format, and the layers that they add."""

from .files import LoraDelta, LoraFile, ParameterDelta, read_lora
from .layers import Lora, dora_scale, finite_strength, fuse_loras, load_lora
from .named import NamedLoras

__all__ = [
    "Lora",
    "LoraDelta",
    "LoraFile",
    "NamedLoras",
    "ParameterDelta",
    "dora_scale",
    "finite_strength",
    "fuse_loras",
    "load_lora",
    "read_lora",
]
