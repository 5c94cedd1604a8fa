"""LoRA files of every kind as the host's own weight patches."""

from __future__ import annotations

import logging

import comfy.model_base
import comfy.model_management as mm
import torch
from comfy.weight_adapter import LoRAAdapter

from ...mochi_core.checkpoints import dit_config, from_state_dict
from ...mochi_core.lora import LoraDelta, dora_scale, read_lora


class DoRAAdapter(LoRAAdapter):
    """The host's LoRA, with DoRA as published; the host's own measures the rows before the low-rank change, not after it."""

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
    """A copy of a Mochi MODEL from any loader, with a LoRA file added to the patches that it has already.

    Raises:
        ValueError: the file is no LoRA for this MODEL, or the MODEL is not Mochi.
    """
    if not isinstance(model.model, comfy.model_base.GenmoMochi):
        raise ValueError(f"The MODEL is {type(model.model).__name__}, not Mochi; connect Load Mochi Transformer.")
    denoiser = model.model.diffusion_model
    # The stock loader's denoiser has the same tensors, but no configuration.
    config = getattr(denoiser, "config", None) or dit_config(from_state_dict(denoiser.state_dict()))
    file = read_lora(path, config)
    if file.unmatched:
        logging.warning(file.unmatched)
    patched = model.clone()
    patched.add_patches(dict(_patch(delta) for delta in file.deltas), strength)
    return patched


def _patch(delta: LoraDelta):
    """A `LoraDelta` as the host's patch: the key of a weight with a range of its rows, and the adapter that changes them."""
    first, end = delta.rows
    key = (f"diffusion_model.{delta.layer}.weight", (0, first, end - first))
    adapter = LoRAAdapter if delta.magnitude is None else DoRAAdapter
    alpha = delta.scale * len(delta.down)
    return key, adapter(set(), (delta.up, delta.down, alpha, None, delta.magnitude, None))
