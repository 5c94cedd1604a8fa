"""Several LoRAs of one denoiser by name, under the names that diffusers' pipelines have for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..transformer.model import AsymmDiT
from .layers import Lora, finite_strength, fuse_loras, load_lora


class NamedLoras:
    """Part of a pipeline: LoRAs of its denoiser by name. `loras[name].strength` may be set at any time, too."""

    def __init__(self, dit: AsymmDiT) -> None:
        self.dit = dit
        self.loras: dict[str, Lora] = {}

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None, strength: float = 1.0) -> None:
        """Add a LoRA file of any kind; its changes add up with those of the others. The name is by default the file's.

        Raises:
            ValueError: there is a LoRA of that name; or see `load_lora`.
            FileNotFoundError: there is no such file.
        """
        name = adapter_name or Path(path).stem
        if name in self.loras:
            raise ValueError(
                f"There is a LoRA {name} already; pass another adapter_name, or delete_adapters({name!r})."
            )
        self.loras[name] = load_lora(self.dit, path, strength)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Give the named LoRAs these strengths, one for all or one each; all others are off until they are named again.

        Raises:
            ValueError: a name that is unknown, or not one finite strength for each; nothing is changed then.
        """
        names = self._known(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"There are {len(names)} names and {len(weights)} strengths; pass one strength for each.")
        strengths = dict(zip(names, map(finite_strength, weights), strict=True))
        for name, lora in self.loras.items():
            lora.strength = strengths.get(name, 0.0)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take the named LoRAs out of the denoiser and free their memory; ValueError for a name that is unknown."""
        for name in self._known(adapter_names):
            self.loras.pop(name).remove()

    def unload_lora_weights(self) -> None:
        """Take all LoRAs out; the denoiser computes what it did before them, bit for bit."""
        self.delete_adapters(list(self.loras))

    def fuse_lora(self) -> None:
        """Compute all LoRAs into the weights, at the strengths that they have; see `fuse_loras`. They have no names after it."""
        fuse_loras(self.dit)
        self.loras.clear()

    def _known(self, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in self.loras]:
            raise ValueError(f"There is no LoRA {unknown[0]}; there are: {', '.join(self.loras) or 'none'}.")
        return names
