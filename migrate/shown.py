"""Text from a workflow, made safe to show in a terminal."""

from __future__ import annotations

SENTENCE_LENGTH = 2000


def sentence(message: object) -> str:
    """`message` on one line, at most `SENTENCE_LENGTH` characters of it; unprintable characters are escaped.

    Same as in `mochi_core.shown`, which cannot be imported here: this package is top-level in the shell and a subpackage in
    ComfyUI, so no single import works in both.
    """
    text = str(message)
    more = f" ... ({len(text):,} characters)" if len(text) > SENTENCE_LENGTH else ""
    kept = text[:SENTENCE_LENGTH]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept) + more


def without_advice(error: object) -> str:
    """An error's text, without Python's advice to raise its limit if a number has thousands of digits.

    Same as in `mochi_core.shown`.
    """
    return str(error).partition("; use sys.")[0]
