"""LoRAs for the denoiser: files of every kind, and the layers that they add."""

from .files import LoraDelta, LoraFile, ParameterDelta, read_lora
from .layers import Lora, dora_scale, load_lora

__all__ = ["Lora", "LoraDelta", "LoraFile", "ParameterDelta", "dora_scale", "load_lora", "read_lora"]
