"""T5 as the host's CLIP, and prompts encoded as Genmo's code does."""

from __future__ import annotations

import copy
import logging
import sys
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.genmo
import comfy.text_encoders.t5
import comfy.utils
import torch

from ...mochi_core.checkpoints import Checkpoint, check_fit
from ...mochi_core.checkpoints.names.t5 import hugging_face_entries, t5_config
from ...mochi_core.dtypes import dtype_name
from ...mochi_core.text_encoder import cut_text, cut_tokens, empty_prompts
from .choices import arithmetic_choice, log_choice, stored_name, weights_choice
from .quantized import attributes_only, host_weights, is_quantized, quantized_operations, read_part

TOKENS_KEY = "t5xxl"
END_TOKEN = 1  # in T5's vocabulary; only padding follows


class MochiT5(comfy.text_encoders.genmo.MochiT5XXL):
    """The host's T5 with padding set to zero, so that it can be told apart after nodes drop the mask or append to the text."""

    def encode_token_weights(self, token_weight_pairs):
        embeds, pooled, extra = super().encode_token_weights(token_weight_pairs)
        return without_padding(embeds, extra["attention_mask"]), pooled, extra


class MochiTokenizer(comfy.text_encoders.genmo.MochiT5Tokenizer):
    """The host's T5 tokenizer, limited to the 256 tokens that Mochi was trained with."""

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        text, rest = cut_text(text)
        expect_any_length(self)
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        return {TOKENS_KEY: limit_tokens(tokens[TOKENS_KEY], self, rest)}


def expect_any_length(tokenizer) -> None:
    """Silence transformers' warning about more tokens than T5 was pre-trained with: we cut what is too long for Mochi."""
    if getattr(tokenizer, "clip", None) == f"clip_{TOKENS_KEY}":
        getattr(tokenizer, tokenizer.clip).tokenizer.model_max_length = sys.maxsize


def limit_tokens(batches: list[list[tuple]], tokenizer, rest: str = "") -> list[list[tuple]]:
    """The host's token batches, of tuples (id, weight), cut to 256 tokens with a warning in the console.

    `rest` is text that was already cut off.
    """
    limited = []
    for tokens in batches:
        kept, warning = cut_tokens(tokens, partial(spell, tokenizer), rest)
        if warning:
            logging.warning(warning)
        limited.append(kept)
    return limited


def spell(tokenizer, tokens: list[tuple]) -> str:
    """The text of the host's tokens; embeddings, which are tensors, are left out."""
    return tokenizer.decode([token for token, *_ in tokens if isinstance(token, int)])


class HostCLIP(comfy.sd.CLIP):
    """The host's CLIP, computing with the model of its current patcher: Select CLIP Device replaces the patcher."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "patcher":
            self.cond_stage_model = value.model

    def get_key_patches(self):
        """The weights that nodes merge; the host's own method raises an AttributeError for the scale of a quantised layer."""
        patcher = self.patcher.clone()
        patcher.model_state_dict = lambda *_, **__: attributes_only(patcher.model, patcher.model.state_dict())
        return patcher.get_key_patches()

    def clone(self, disable_dynamic=False):
        clone = copy.copy(self)
        clone.patcher = self.patcher.clone(disable_dynamic=disable_dynamic)
        clone.tokenizer_options = self.tokenizer_options.copy()
        return clone


def load_clip(
    path: str, dtype: torch.dtype | None = None, device: str = "default", disable_dynamic: bool = False
) -> HostCLIP:
    """A CLIP from a T5 encoder of any size, on the host's own T5 classes, so that the host casts and offloads it.

    Raises:
        ValueError: the file is not a T5 encoder.
    """
    checkpoint = read_part(path, "t5")
    config = host_config(checkpoint)
    module = comfy.text_encoders.t5.T5(config, torch.float32, "meta", comfy.ops.manual_cast)
    check_fit(dict(module.named_parameters()), checkpoint)
    weights = host_weights(checkpoint.tensors, module)
    options: dict[str, Any] = {"t5xxl_model_config": config, "dtype": dtype or _norm_dtype(checkpoint)}
    if is_quantized(checkpoint):
        if options["dtype"].itemsize == 1:  # the dtype of weights that are not quantised
            options["dtype"] = torch.bfloat16
        operations = comfy.ops.mixed_precision_ops({}, options["dtype"], full_precision_mm=True)
        options["custom_operations"] = quantized_operations(operations)
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    target = comfy.supported_models_base.ClipTarget(MochiTokenizer, MochiT5)
    clip = HostCLIP(
        target,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (load_clip_patcher, (path, dtype, device))
    stored, where = stored_name(checkpoint), clip.patcher.load_device
    held = stored if is_quantized(checkpoint) else dtype_name(options["dtype"])
    log_choice("T5", weights_choice(stored, held, dtype is not None, where), arithmetic_choice(torch.float32, where))
    return clip


def load_clip_patcher(path: str, dtype: torch.dtype | None, device: str, disable_dynamic: bool = False):
    """The patcher of a CLIP loaded again; the host calls this for another device."""
    return load_clip(path, dtype, device, disable_dynamic).patcher


def host_config(checkpoint: Checkpoint) -> dict:
    """The sizes of a T5 v1.1 encoder as a configuration of the host's T5."""
    fixed = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5"}
    return {**hugging_face_entries(t5_config(checkpoint)), **fixed}


def _norm_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The stored dtype of the norms, which are never quantised; the host uses it too. Either way it computes in float32."""
    return checkpoint.tensors["encoder.final_layer_norm.weight"].dtype


def encode_prompt(clip: comfy.sd.CLIP, prompt: str) -> list:
    """CONDITIONING exactly as Genmo's: plain text, at most 256 tokens, and no tokens at all for an empty prompt.

    Raises:
        ValueError: `clip` is not a T5 for Mochi, or the prompt cannot be read.
    """
    tokens = _tokens(clip, prompt)
    if prompt:
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        return [_with_mask(embeds, extra, tokens[TOKENS_KEY]) for embeds, extra in conditioning]
    width = clip.cond_stage_model.t5xxl.transformer.get_input_embeddings().embedding_dim
    embeds, mask = empty_prompts(1, width, device=mm.intermediate_device())
    # Hooks and schedules of the CLIP come with its encodings, so an empty prompt is only encoded if there are any.
    hooked = clip.encode_from_tokens_scheduled(tokens) if clip.patcher.forced_hooks else [[embeds, {}]]
    return [[embeds, {**extra, "attention_mask": mask.long(), "pooled_output": None}] for _, extra in hooked]


def _tokens(clip: comfy.sd.CLIP, prompt: str) -> dict[str, list[list[tuple]]]:
    """The tokens of a prompt without weights, at most 256 of them."""
    if isinstance(clip.tokenizer, MochiTokenizer):
        return clip.tokenize(prompt, disable_weights=True)
    text, rest = cut_text(prompt)
    expect_any_length(clip.tokenizer)
    tokens = clip.tokenize(text, disable_weights=True)
    if set(tokens) != {TOKENS_KEY}:
        raise ValueError("This CLIP is not Mochi's T5; use Load Mochi T5, or Load CLIP with type mochi.")
    return {TOKENS_KEY: limit_tokens(tokens[TOKENS_KEY], clip.tokenizer, rest)}


def _with_mask(embeds: torch.Tensor, extra: dict, batches: list[list[tuple]]) -> list:
    """An entry of CONDITIONING with the mask of its tokens, which the host leaves out where a CLIP has a schedule."""
    mask = extra.get("attention_mask")
    if mask is None:
        lengths = torch.tensor([[count_tokens(tokens)] for tokens in batches], device=embeds.device)
        mask = (torch.arange(embeds.shape[1], device=embeds.device) < lengths).long()
    return [without_padding(embeds, mask), {**extra, "attention_mask": mask}]


def count_tokens(tokens: list[tuple]) -> int:
    """Tokens up to the end token, without the padding behind; a token may be an embedding, (rows, width)."""
    count = 0
    for token, *_ in tokens:
        count += 1 if isinstance(token, int) else len(torch.atleast_2d(token))
        if isinstance(token, int) and token == END_TOKEN:
            break
    return count


def without_padding(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Text features (B, L, width) with zeros where `mask` (B, L) is zero."""
    return embeds * mask.to(embeds)[..., None]
