"""Mochi's text conditioning: at most 256 tokens, the end token kept, and no tokens for an empty prompt."""

import pytest
import torch
from transformers import AutoTokenizer

from mochi_core.text_encoder import MAX_CHARACTERS, cut_text, cut_tokens, empty_prompts
from tests.harness import trained


def spell(tokens):
    return " ".join(map(str, tokens))


@pytest.mark.parametrize("length", [0, 1, 255, 256])
def test_prompts_that_fit_stay_whole(length):
    tokens = list(range(length))
    assert cut_tokens(tokens, spell) == (tokens, None)


@pytest.mark.parametrize(("length", "lost"), [(257, "255"), (259, "255 256 257")])
def test_longer_ones_keep_their_end_token_and_quote_what_is_lost(length, lost):
    tokens, warning = cut_tokens(list(range(length)), spell)
    assert tokens == [*range(255), length - 1]
    assert warning == f"The prompt has {length} tokens, but Mochi reads 256; cut off: “{lost}”"


def test_a_warning_quotes_at_most_a_line():
    tokens, warning = cut_tokens(
        list(range(1000)), lambda _: "first " + "so\n\x1b[31m long " * 1000 + "last", " of all"
    )
    assert tokens == [*range(255), 999]
    assert warning.startswith(
        "The prompt has more than 1000 tokens, but Mochi reads 256; cut off: “first so \\x1b[31m long so"
    )
    assert warning.endswith("long last of all”")
    assert len(warning) < 250
    assert warning.isprintable()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(trained.TOKENIZER, local_files_only=True)


@pytest.mark.parametrize("count", [1, 256, 257, 5_000])
def test_what_is_cut_before_it_becomes_tokens_does_not_change_the_first(tokenizer, count):
    words = [f"w{i}" * (i % 3 + 1) + " " * (i % 4) for i in range(count)]
    prompt = " ".join(words) + "\n"
    text, rest = cut_text(prompt)
    assert (text == prompt, rest == "") == (count < 5_000,) * 2
    ids = tokenizer(prompt, verbose=False).input_ids
    assert cut_tokens(tokenizer(text, verbose=False).input_ids, spell, rest)[0] == cut_tokens(ids, spell)[0]


@pytest.mark.parametrize(
    ("prompt", "text"), [("a" + " " * 10**6 + "b", "a b"), ("word " * 10**6, None), ("x" * 10**6, "x" * MAX_CHARACTERS)]
)
def test_megabytes_are_cut(prompt, text):
    begin, rest = cut_text(prompt)
    assert len(begin) <= MAX_CHARACTERS
    assert begin == text or (text is None and begin.endswith("word") and rest.startswith(" word"))


def test_half_of_a_character_is_named():
    with pytest.raises(
        ValueError, match=r"half of a character, U\+D83D, at position 7; delete it, or write the whole character"
    ):
        cut_text("A kite\ud83d")


def test_empty_prompts_have_no_valid_token():
    embeds, mask = empty_prompts(2, 8, torch.bfloat16)
    assert (embeds.shape, embeds.dtype) == ((2, 256, 8), torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((2, 256), torch.bool)
    assert not embeds.any()
    assert not mask.any()
