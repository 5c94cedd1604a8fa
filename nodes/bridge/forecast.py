"""Forecasts shown before a run: a prompt's tokens, a video's memory."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import comfy.text_encoders.genmo
import torch

from ...mochi_core import AsymmDiTConfig, VideoSize
from ...mochi_core.checkpoints import open_checkpoint, quantize_block_matrices, select_part
from ...mochi_core.checkpoints.names.sizes import dit_config
from ...mochi_core.config import MAX_TEXT_TOKENS
from ...mochi_core.doctor.forecast import denoising_bytes, memory_sentence
from ...mochi_core.doctor.needs import loaded_bytes
from ...mochi_core.text_encoder import cut_text, cut_tokens
from .model import choose_dtypes
from .other_files import naming_loaders
from .text import TOKENS_KEY, count_tokens, expect_any_length, spell

_TOKENIZER_LOCK = threading.Lock()  # tokenizers of `transformers` cannot be used by two threads at once


@functools.cache
def _tokenizer():
    return comfy.text_encoders.genmo.MochiT5Tokenizer()


def describe_prompt(prompt: str) -> str:
    """How many of the 256 tokens a prompt takes, or what will be cut off.

    Raises:
        ValueError: the prompt cannot be read.
    """
    if not prompt:
        return "empty: no text at all, as in Genmo's code"
    text, rest = cut_text(prompt)
    with _TOKENIZER_LOCK:
        tokenizer = _tokenizer()
        expect_any_length(tokenizer)
        (tokens,) = tokenizer.tokenize_with_weights(text, disable_weights=True)[TOKENS_KEY]
        _, warning = cut_tokens(tokens, functools.partial(spell, tokenizer), rest)
    return warning or f"{count_tokens(tokens)} of {MAX_TEXT_TOKENS} tokens"


@dataclass(frozen=True)
class ModelFile:
    """A transformer file and how to load it: arguments of `load_model`."""

    path: str
    dtype: torch.dtype | None = None
    quantize: str | None = None


def describe_memory(size: VideoSize, videos: int, window: int | None, file: ModelFile | None) -> str:
    """Roughly how much memory denoising takes on the host's device, and how much the device has.

    `videos` are made at once; `window` is the number of latent frames denoised together, None for all. Without a `file`, the
    model is the released one in 16 bits, and its weights are not mentioned.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or is not a Mochi transformer.
    """
    config, itemsize, weights = AsymmDiTConfig(), 2, None
    if file is not None:
        with naming_loaders():
            checkpoint = select_part(open_checkpoint(file.path), "transformer")
        held, cast = choose_dtypes(quantize_block_matrices(checkpoint, file.quantize), file.dtype)
        config, itemsize = dit_config(checkpoint.tensors), (cast or held).itemsize
        weights = loaded_bytes(checkpoint, held.itemsize, file.quantize)
    device = mm.get_torch_device()
    total: Any = mm.get_total_memory(device)  # a single number unless `torch_total_too` is set
    return memory_sentence(denoising_bytes(config, size, videos, window, itemsize), weights, total, str(device))
