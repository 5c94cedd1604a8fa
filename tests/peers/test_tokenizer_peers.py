"""The tokenizer shipped with the tiny T5 is T5's own."""

import pytest
from transformers import AutoTokenizer

from tests.harness import trained

TEXTS = (
    "a red kite",
    "",
    "  many   spaces \n\t",
    "Ünïcödé — “quotes” \u6f22\u5b57 \U0001f642",
    "(blue:1.5) kite",
    "<extra_id_3> x </s> y",
)


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_comfyuis(comfy_path, text):
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for folder in (trained.TOKENIZER, comfy_path / "comfy" / "text_encoders" / "t5_tokenizer")
    )
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
