"""What Mochi is conditioned on: 256 tokens at most, the end token kept, and nothing at all for an empty prompt."""

import pytest
import torch

from mochi_core.text_encoder import cut_tokens, empty_prompts


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
    assert warning == f"The prompt has {length} tokens and Mochi reads 256; cut off: “{lost}”"


def test_empty_prompts_have_no_valid_token():
    embeds, mask = empty_prompts(2, 8, torch.bfloat16)
    assert (embeds.shape, embeds.dtype) == ((2, 256, 8), torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((2, 256), torch.bool)
    assert not embeds.any()
    assert not mask.any()
