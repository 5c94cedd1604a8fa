"""Prompts to T5 features, with the T5 encoder of `transformers`.

This is the only file of the core that uses `transformers`, and it imports it when a text encoder is loaded: that takes
seconds, which the rest of the core should not cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoints import load_into, open_part
from .checkpoints.names.t5 import hugging_face_entries, t5_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

MAX_TOKENS = 256
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class TextEncoder:
    """A T5 encoder and its tokenizer."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of each prompt as Mochi wants them, on the device of the model.

        An empty prompt has no valid token at all (T5's end token included). A prompt of more than 256 tokens is cut, with
        a warning that quotes what was lost.

        Returns:
            (B, 256, width) features, zero where nothing is valid, and the (B, 256) bool mask of valid tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        device, width = self.model.device, self.model.config.d_model
        embeds = torch.zeros(len(prompts), MAX_TOKENS, width, device=device, dtype=self.model.dtype)
        mask = torch.zeros(len(prompts), MAX_TOKENS, device=device, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if prompt:
                ids = torch.tensor([self.tokenize(prompt)], device=device)
                length = ids.shape[1]
                embeds[row, :length] = self.model(input_ids=ids).last_hidden_state[0]
                mask[row, :length] = True
        return embeds, mask

    def tokenize(self, prompt: str) -> list[int]:
        """At most 256 token ids, the end token last."""
        ids: list[int] = self.tokenizer(prompt).input_ids
        if len(ids) <= MAX_TOKENS:
            return ids
        kept, cut, end = ids[: MAX_TOKENS - 1], ids[MAX_TOKENS - 1 : -1], ids[-1:]
        lost = self.tokenizer.decode(cut)
        warnings.warn(f"The prompt has {len(ids)} tokens and Mochi reads {MAX_TOKENS}; cut off: “{lost}”", stacklevel=3)
        return kept + end

    def to(self, device: torch.device | str) -> TextEncoder:
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        return self


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load a T5 encoder of any size from a file or a (sharded) folder.

    Args:
        path: weights, in Hugging Face's names.
        tokenizer: tokenizer file, or folder with one; by default looked for beside the weights.
        dtype: T5 overflows in float16 on some prompts; Genmo runs it in float32.

    Raises:
        ValueError: the weights are not those of a T5 encoder, or there is no tokenizer.
    """
    from transformers import T5Config, T5EncoderModel

    checkpoint = open_part(path, "t5")
    config = T5Config(**hugging_face_entries(t5_config(checkpoint)))
    with torch.device("meta"):
        model = T5EncoderModel(config).to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    model.encoder.embed_tokens = model.shared  # one table under two names
    load_into(model, checkpoint, device)
    return TextEncoder(model.eval(), _load_tokenizer(Path(path), tokenizer))


def _load_tokenizer(weights: Path, tokenizer: str | Path | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if tokenizer is None:
        beside = weights if weights.is_dir() else weights.parent
        places = [beside, beside / "tokenizer", beside.parent / "tokenizer"]
    else:
        given = Path(tokenizer)
        places = [given.parent if given.is_file() else given]
    for folder in places:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    raise ValueError(
        f"There is no T5 tokenizer in {', '.join(map(str, places))}; pass tokenizer=... with a folder that holds "
        "tokenizer.json, for example comfy/text_encoders/t5_tokenizer inside ComfyUI."
    )
