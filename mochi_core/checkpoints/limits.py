"""Limits on everything in a weights file but the weights, so that a few bytes cannot exhaust a machine.

The comments give the figures of real files: Mochi's releases, and what other tools make of them.
"""

from __future__ import annotations

import json
from typing import Any

from ..shown import without_advice

MAX_TENSORS = 16_000
"""Tensors in a file or index, and keys in a GGUF file; the transformer has 1,056, or some 6,000 in bitsandbytes' 4 bits."""
MAX_AXES = 8
"""Axes of a tensor; real ones have five."""
MAX_NAME = 500
"""Characters of a tensor's name; real ones have up to 120."""
MAX_BLOCKS = 512
"""Blocks of one kind in a model; the transformer has 48, T5 24."""
MAX_HEADER_BYTES = 64_000_000
"""Size of a safetensors file's header; the transformer's takes 0.13 MB. Tools add text of any length: the tags of all training
images, a preview, the workflow."""
MAX_GGUF_HEADER_BYTES, MAX_GGUF_TEXTS = 30_000_000, 1_000_000
"""Size of a GGUF file's header, and the strings in its lists; vocabularies of language models have up to 850,000 in 15 MB, T5's
has 32,000."""
MAX_PICKLE_BYTES, MAX_PICKLE_STEPS = 4_000_000, 200_000
"""Size and opcodes of the pickle that lists a torch.save file's tensors; the transformer's takes 0.15 MB and 42,000 opcodes."""
MAX_INDEX_BYTES, MAX_SHARDS = 4_000_000, 500
"""Size of a shard index, and its number of shards; the transformer's takes 0.1 MB and lists 5, T5's 2."""
MAX_JSON_PARTS = 200_000
"""Lists and objects in a header, an index or a note; the transformer's header has 3,200."""
MAX_JSON_COMMAS = 1_000_000
"""Commas there, including those in strings; a million numbers and names take seconds. Image tags have one per 15 bytes."""


def read_json(text: str, **options: Any) -> Any:
    """`json.loads` for untrusted text; also raises ValueError for text that takes seconds or is nested too deeply."""
    if text.count("[") + text.count("{") > MAX_JSON_PARTS:
        raise ValueError(f"it has more than {MAX_JSON_PARTS:,} parts")
    if text.count(",") > MAX_JSON_COMMAS:
        raise ValueError(f"it has more than {MAX_JSON_COMMAS:,} commas")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(without_advice(error)) from None
