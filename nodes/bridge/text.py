"""T5 as the host's CLIP, and prompts as Genmo conditions on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.genmo
import comfy.text_encoders.t5
import comfy.utils
import torch

from ...mochi_core.checkpoints import LazyStateDict, blaming, check_tensors
from ...mochi_core.checkpoints.names.t5 import hugging_face_entries, t5_config
from ...mochi_core.text_encoder import MAX_TOKENS
from .choices import arithmetic_choice, dtype_name, log_choice, stored_form, weights_choice
from .quantized import host_weights, is_quantized, quantized_operations, read_part

TOKENS_KEY = "t5xxl"
END_TOKEN, PAD_TOKEN = 1, 0


class MochiTokenizer(comfy.text_encoders.genmo.MochiT5Tokenizer):
    """The host's T5 tokenizer, held to the 256 tokens that Mochi was trained with."""

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        return {TOKENS_KEY: limit_tokens(tokens[TOKENS_KEY], self)}


def limit_tokens(batches: list[list[tuple]], tokenizer) -> list[list[tuple]]:
    """Cut every prompt at 256 tokens, the end token kept, and say what was lost."""
    return [_limit(tokens, tokenizer) for tokens in batches]


def _limit(tokens: list[tuple], tokenizer) -> list[tuple]:
    if len(tokens) <= MAX_TOKENS:
        return tokens
    kept, cut = tokens[: MAX_TOKENS - 1], tokens[MAX_TOKENS - 1 :]
    ids = [token[0] for token in cut if isinstance(token[0], int) and token[0] not in (END_TOKEN, PAD_TOKEN)]
    logging.warning(
        "The prompt has %d tokens and Mochi reads %d; cut off: “%s”", len(tokens), MAX_TOKENS, tokenizer.decode(ids)
    )
    return [*kept, cut[-1]]


def load_clip(path: str, dtype: torch.dtype | None = None, device: str = "default") -> comfy.sd.CLIP:
    """A CLIP from a T5 encoder of any size, on the host's own T5 classes (so that it is cast and offloaded by it).

    Raises:
        ValueError: the file is no T5 encoder.
    """
    tensors, name = read_part(path, "t5"), Path(path).name
    with blaming(name):
        config = host_config(tensors)
    module = comfy.text_encoders.t5.T5(config, torch.float32, "meta", comfy.ops.manual_cast)
    check_tensors(module, tensors, name)
    weights = host_weights(tensors, module)
    options: dict[str, Any] = {"t5xxl_model_config": config, "dtype": dtype or _stored_dtype(tensors)}
    if is_quantized(tensors):
        if options["dtype"].itemsize == 1:  # of what is not quantised
            options["dtype"] = torch.bfloat16
        operations = comfy.ops.mixed_precision_ops({}, options["dtype"], full_precision_mm=True)
        options["custom_operations"] = quantized_operations(operations)
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    target = comfy.supported_models_base.ClipTarget(MochiTokenizer, comfy.text_encoders.genmo.MochiT5XXL)
    clip = comfy.sd.CLIP(
        target, parameters=comfy.utils.calculate_parameters(weights), state_dict=[weights], model_options=options
    )
    stored, where = stored_form(tensors), clip.patcher.load_device
    held = stored if is_quantized(tensors) else dtype_name(options["dtype"])
    log_choice("T5", weights_choice(stored, held, dtype is not None, where), arithmetic_choice(torch.float32, where))
    return clip


def host_config(tensors: LazyStateDict) -> dict:
    """The sizes of a T5 v1.1 encoder in the words of the host's T5."""
    fixed = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5"}
    return {**hugging_face_entries(t5_config(tensors)), **fixed}


def _stored_dtype(tensors: LazyStateDict) -> torch.dtype:
    """The file's own precision, as the host loads T5 too; the arithmetic is float32 either way."""
    return tensors["encoder.final_layer_norm.weight"].dtype


def encode_prompt(clip: comfy.sd.CLIP, prompt: str) -> list:
    """CONDITIONING exactly as Genmo's: plain text, at most 256 tokens, and no token at all for an empty prompt.

    Raises:
        ValueError: `clip` is not a T5 for Mochi.
    """
    tokens = clip.tokenize(prompt, disable_weights=True)
    if set(tokens) != {TOKENS_KEY}:
        raise ValueError("This CLIP is not Mochi's T5; use Load Mochi T5, or Load CLIP with type mochi.")
    tokens = {TOKENS_KEY: limit_tokens(tokens[TOKENS_KEY], clip.tokenizer)[:1]}
    if not prompt:
        width = clip.cond_stage_model.t5xxl.transformer.get_input_embeddings().embedding_dim
        mask = torch.zeros(1, MAX_TOKENS, dtype=torch.long, device=mm.intermediate_device())
        return [
            [torch.zeros(1, MAX_TOKENS, width, device=mask.device), {"attention_mask": mask, "pooled_output": None}]
        ]
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if any("attention_mask" not in extra for _, extra in conditioning):
        raise ValueError("This CLIP returns no attention mask; use Load Mochi T5, or Load CLIP with type mochi.")
    return conditioning
