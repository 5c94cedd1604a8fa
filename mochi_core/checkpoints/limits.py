"""How large a weights file may be in other ways than by its weights, so that a few bytes cannot ask for all of a machine.

What real files have is in the comments: of those that Mochi was released in, and of those that other tools make of them.
"""

from __future__ import annotations

import json
from typing import Any

from ..shown import without_advice

MAX_TENSORS = 16_000
"""Tensors in one file or index, and keys of a GGUF file; the transformer has 1,056, in bitsandbytes' 4 bits some 6,000."""
MAX_AXES = 8
"""Axes of a tensor; real ones have five."""
MAX_NAME = 500
"""Characters of a tensor's name; real ones have up to 120."""
MAX_BLOCKS = 512
"""Blocks of one kind in a model; the transformer has 48, T5 24."""
MAX_HEADER_BYTES = 64_000_000
"""Size of a safetensors file's header; the transformer's takes 0.13 MB. Tools add texts of any length: tags of all pictures, a
preview, the workflow."""
MAX_GGUF_HEADER_BYTES, MAX_GGUF_TEXTS = 30_000_000, 1_000_000
"""Size of a GGUF file's header, and the texts in its lists; vocabularies of language models have up to 850,000 in 15 MB, T5's
has 32,000."""
MAX_PICKLE_BYTES, MAX_PICKLE_STEPS = 4_000_000, 200_000
"""Size and steps of the pickle in a torch.save file, which lists tensors; the transformer's takes 0.15 MB and 42,000 steps."""
MAX_INDEX_BYTES, MAX_SHARDS = 4_000_000, 500
"""Size of an index of shards, and the shards in it; the transformer's takes 0.1 MB and lists 5, T5's 2."""
MAX_JSON_PARTS = 200_000
"""Lists and objects in a header, an index or a note; the transformer's header has 3,200."""
MAX_JSON_COMMAS = 1_000_000
"""Commas there, also those in texts; a million numbers and names take seconds. Tags of pictures have one in 15 bytes."""


def read_json(text: str, **options: Any) -> Any:
    """`json.loads` for text of strangers; ValueError also for what it would take seconds for, or cannot take at all."""
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
