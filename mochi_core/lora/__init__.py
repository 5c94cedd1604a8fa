"""LoRAs for the denoiser: files of every kind, and the layers that they add."""

from .files import LoraFile, LoraUpdate, read_lora
from .layers import Lora, load_lora

__all__ = ["Lora", "LoraFile", "LoraUpdate", "load_lora", "read_lora"]
