"""LoRA files of every kind as the host's own weight patches."""

from __future__ import annotations

import logging

import comfy.lora
import comfy.model_base
import comfy.model_management as mm
import torch
from comfy.weight_adapter import LoRAAdapter

from ...mochi_core.checkpoints import dit_config, from_state_dict
from ...mochi_core.lora import LoraDelta, LoraFile, ParameterDelta, dora_scale, finite_strength, read_lora
from ...mochi_core.lora.targets import TargetRows, find_target, lora_targets
from .other_files import naming_loaders


class DoRAAdapter(LoRAAdapter):
    """The host's LoRA, with DoRA as published; the host's own takes the row norms before the low-rank update, not after it."""

    def calculate_weight(
        self, weight, _key, strength, _strength_model, _offset, function, dtype=torch.float32, _original=None
    ):
        up, down, alpha, _, magnitude, _ = self.weights
        up, down, magnitude = (mm.cast_to_device(t, weight.device, dtype) for t in (up, down, magnitude))
        changed = weight + (alpha / len(down)) * (up @ down).to(weight.dtype)
        changed *= dora_scale(changed, magnitude)[:, None]
        weight += function(strength * (changed - weight))
        return weight


def add_lora(model, path: str, strength: float):
    """A copy of a Mochi MODEL from any loader, with a LoRA file added to its patches.

    Raises:
        ValueError: the file is not a LoRA for this MODEL, the MODEL is not Mochi, or `strength` is not finite.
    """
    finite_strength(strength)  # the host does not check for NaN, or values from another node
    if not isinstance(model.model, comfy.model_base.GenmoMochi):
        raise ValueError(f"The MODEL is {type(model.model).__name__}, not Mochi; connect Load Mochi Transformer.")
    denoiser = model.model.diffusion_model
    # The stock loader's denoiser has the same tensors but no configuration.
    config = getattr(denoiser, "config", None) or dit_config(from_state_dict(denoiser.state_dict()))
    file = read_lora(path, config)
    adapters, read_by_host = _host_adapters(file, lora_targets(config))
    with naming_loaders():
        left_out = file.report(read_by_host)
    if left_out:
        logging.warning(left_out)
    patched = model.clone()
    patched.add_patches(dict(_patch(delta) for delta in file.deltas) | adapters, strength)
    return patched


def _patch(delta: LoraDelta | ParameterDelta):
    """A delta as the host's patch: the key of a parameter with a range of its rows, and the adapter for them."""
    if isinstance(delta, ParameterDelta):
        return _key(delta.parameter, *delta.rows), ("diff", (delta.change,))
    adapter = LoRAAdapter if delta.magnitude is None else DoRAAdapter
    alpha = delta.scale * len(delta.down)
    weights = (delta.up, delta.down, alpha, None, delta.magnitude, None)
    return _key(f"{delta.layer}.weight", *delta.rows), adapter(set(), weights)


def _key(parameter: str, first: int, end: int):
    return f"diffusion_model.{parameter}", (0, first, end - first)


def _host_adapters(file: LoraFile, targets: dict[str, TargetRows]) -> tuple[dict, set[str]]:
    """The host's patches for kinds that only the host can read, such as LoHa and LoKr, and the names that it read."""
    unread = {name for name in file.checkpoint.tensors if name in file.unmatched}
    layers = {".".join(name.split(".")[:-count]) for name in unread for count in (1, 2)}
    found = {layer: target for layer in layers if (target := find_target(targets, layer)) is not None}
    # Reordered rows would need reordered adapters, which only the core's own kinds support.
    keys = {
        layer: _key(target.parameter, target.first_row, target.first_row + target.rows)
        for layer, target in found.items()
        if not target.swap_halves
    }
    tensors = {
        name: tensor.read().clone()
        for name, tensor in file.checkpoint.tensors.items()
        if any(name.startswith(f"{layer}.") for layer in keys)
    }
    patches = comfy.lora.load_lora(tensors, keys, log_missing=False)
    layers_read = {layer for layer, key in keys.items() if key in patches}
    names_read = {name for name in tensors if any(name.startswith(f"{layer}.") for layer in layers_read)}
    return patches, layers_read | names_read
