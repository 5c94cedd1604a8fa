"""Several LoRAs of one denoiser by name, with the method names of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..transformer.model import AsymmDiT
from .layers import Lora, finite_strength, fuse_loras, load_lora


class NamedLoras:
    """The LoRAs of a pipeline's denoiser by name. `loras[name].strength` may also be set directly at any time."""

    def __init__(self, dit: AsymmDiT) -> None:
        self.dit = dit
        self.loras: dict[str, Lora] = {}

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None, strength: float = 1.0) -> None:
        """Add a LoRA file in any format; its changes add to those of the others. The default name is the file's stem.

        Raises:
            ValueError: there is already a LoRA of that name; or see `load_lora`.
            FileNotFoundError: there is no such file.
        """
        name = adapter_name or Path(path).stem
        if name in self.loras:
            raise ValueError(
                f"There is already a LoRA {name}; pass another adapter_name, or call delete_adapters({name!r})."
            )
        self.loras[name] = load_lora(self.dit, path, strength)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Set the strengths of the named LoRAs, one for all or one each; all others are off until they are named again.

        Raises:
            ValueError: a name is unknown, or there is not one finite strength for each; nothing is changed then.
        """
        names = self._known(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"There are {len(names)} names, but {len(weights)} strengths; pass one strength for each.")
        strengths = dict(zip(names, map(finite_strength, weights), strict=True))
        for name, lora in self.loras.items():
            lora.strength = strengths.get(name, 0.0)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take the named LoRAs out of the denoiser and free their memory; ValueError for an unknown name."""
        for name in self._known(adapter_names):
            self.loras.pop(name).remove()

    def unload_lora_weights(self) -> None:
        """Take all LoRAs out; the denoiser then computes exactly what it did before, bit for bit."""
        self.delete_adapters(list(self.loras))

    def fuse_lora(self) -> None:
        """Merge all LoRAs into the weights at their current strengths; see `fuse_loras`. Their names are then forgotten."""
        fuse_loras(self.dit)
        self.loras.clear()

    def _known(self, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in self.loras]:
            raise ValueError(f"There is no LoRA {unknown[0]}; there are: {', '.join(self.loras) or 'none'}.")
        return names
