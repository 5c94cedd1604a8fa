"""Prompts to T5 features, with the T5 encoder of `transformers`.

This is the only file of the core that uses `transformers`. It imports it only when a text encoder is loaded, because that takes
seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .checkpoints import load_into, open_part
from .checkpoints.names.t5 import hugging_face_entries, t5_config
from .config import MAX_TEXT_TOKENS
from .devices import check_device
from .mapped_files import check_mapped_files
from .shown import shown

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5EncoderModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MAX_CHARACTERS = 20_000
"""Prompts are tokenized up to this length: a T5 token has at most 16 characters, and tokenizing a megabyte takes ten seconds."""
LINE = 120
"""Most characters of a prompt that a warning quotes."""
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
Token = TypeVar("Token")


def cut_text(prompt: str) -> tuple[str, str]:
    """Split a prompt into its beginning, which is all of it unless it is very long, and the rest; at a space if possible.

    Raises:
        ValueError: the prompt contains a lone surrogate, which T5 cannot read.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        half = f"half of a character, U+{ord(prompt[error.start]):04X}, at position {error.start + 1}"
        raise ValueError(f"The prompt has {half}; delete it, or write the whole character.") from None
    if len(prompt) <= MAX_CHARACTERS:
        return prompt, ""
    text = " ".join(prompt.split())  # T5 treats a run of spaces as one
    end = len(text) if len(text) <= MAX_CHARACTERS else max(text.rfind(" ", 0, MAX_CHARACTERS), 0) or MAX_CHARACTERS
    return text[:end], text[end:]


def cut_tokens(
    tokens: list[Token], decode: Callable[[list[Token]], str], rest: str = ""
) -> tuple[list[Token], str | None]:
    """Cut a prompt of more than 256 tokens to the first 255 and the last one, which is T5's end token.

    Also returns a warning that quotes what was cut off, the tokens decoded by `decode` and the untokenized `rest`, or None if
    nothing was.
    """
    if len(tokens) <= MAX_TEXT_TOKENS and not rest:
        return tokens, None
    kept, lost, end = (
        tokens[: MAX_TEXT_TOKENS - 1],
        tokens[MAX_TEXT_TOKENS - 1 : -1],
        tokens[MAX_TEXT_TOKENS - 1 :][-1:],
    )
    count = f"more than {len(tokens)}" if rest else len(tokens)
    quote = _shortened((decode(lost) if lost else "") + rest)
    return kept + end, f"The prompt has {count} tokens, but Mochi reads {MAX_TEXT_TOKENS}; cut off: “{quote}”"


def _shortened(text: str) -> str:
    """Text shortened to a line: only the beginning and the end if it is longer."""
    begin, end = (" ".join(part.split()) for part in (text[:LINE], text[-LINE:]))
    line = f"{begin[: LINE // 2]} ... {end[-LINE // 2 :]}" if len(text) > LINE else begin
    return shown(line, 2 * LINE)


def empty_prompts(
    count: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Features of empty prompts, (count, 256, width) zeros, and their mask of valid tokens, (count, 256) bool, all False.

    Genmo's pipeline zeroes both, including the end token (genmoai/mochi, mochi_preview/pipelines.py).
    """
    embeds = torch.zeros(count, MAX_TEXT_TOKENS, width, dtype=dtype, device=device)
    return embeds, torch.zeros(count, MAX_TEXT_TOKENS, dtype=torch.bool, device=device)


class TextEncoder:
    """A T5 encoder and its tokenizer."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of each prompt as Mochi was trained with, on the device of the model.

        An empty prompt has no valid token, not even T5's end token. A prompt of more than 256 tokens is cut, with a warning
        that quotes what was cut off.

        Returns:
            (B, 256, width) features, zero where no token is valid, and the (B, 256) bool mask of valid tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_mapped_files(self.model)
        device, width = self.model.device, self.model.config.d_model
        embeds, mask = empty_prompts(len(prompts), width, self.model.dtype, device)
        for row, prompt in enumerate(prompts):
            if prompt:
                ids = torch.tensor([self.tokenize(prompt)], device=device)
                length = ids.shape[1]
                embeds[row, :length] = self.model(input_ids=ids).last_hidden_state[0]
                mask[row, :length] = True
        return embeds, mask

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at most 256, with the end token last; a warning quotes what was cut off."""
        text, rest = cut_text(prompt)
        ids = self.tokenizer(text, verbose=False).input_ids  # verbose, transformers would warn about the length itself
        ids, warning = cut_tokens(ids, lambda lost: str(self.tokenizer.decode(lost)), rest)
        if warning:
            warnings.warn(warning, stacklevel=3)
        return ids

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the model; returns self."""
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        return self


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
) -> TextEncoder:
    """Load a T5 encoder of any size from a file or a (sharded) folder.

    Args:
        path: weights; any layout that `open_part` reads.
        tokenizer: tokenizer file, or folder with one; by default searched for next to the weights.
        dtype: T5 overflows in float16 on some prompts; Genmo runs it in float32.
        mmap: as for `load_transformer`.

    Raises:
        ValueError: the weights are not those of a T5 encoder, there is no tokenizer, or the device does not exist.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    check_device(device)
    checkpoint, folder = open_part(path, "t5"), find_tokenizer(path, tokenizer)
    config = T5Config(**hugging_face_entries(t5_config(checkpoint)))
    with torch.device("meta"):
        model = T5EncoderModel(config).to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    model.encoder.embed_tokens = model.shared  # one table under two names
    load_into(model, checkpoint, device, mmap=mmap)
    return TextEncoder(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def find_tokenizer(path: str | Path, tokenizer: str | Path | None = None) -> Path:
    """The folder of a T5 tokenizer: the given one, or one near the weights at `path`; ValueError if there is none."""
    weights = Path(path)
    if tokenizer is None:
        beside = weights if weights.is_dir() else weights.parent
        places = [beside, beside / "tokenizer", beside.parent / "tokenizer"]
    else:
        given = Path(tokenizer)
        places = [given.parent if given.is_file() else given]
    for folder in places:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise ValueError(
        f"There is no T5 tokenizer in {', '.join(map(str, places))}; pass tokenizer=... with a folder that contains "
        "tokenizer.json, for example comfy/text_encoders/t5_tokenizer inside ComfyUI."
    )
