"""Text of a workflow, made fit for a terminal."""

from __future__ import annotations

SENTENCE_LENGTH = 2000


def sentence(message: object) -> str:
    """`message` on one line, with at most `SENTENCE_LENGTH` characters of it; what does not show itself is escaped.

    As in `mochi_core.shown`, which cannot be imported here: this package is top-level in the shell and a subpackage in
    ComfyUI, so no single import finds it in both.
    """
    text = str(message)
    more = f" ... ({len(text):,} characters)" if len(text) > SENTENCE_LENGTH else ""
    kept = text[:SENTENCE_LENGTH]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept) + more


def without_advice(error: object) -> str:
    """What Python says of a number of thousands of digits, without the way to switch its limit off; other errors whole.

    As in `mochi_core.shown`, too.
    """
    return str(error).partition("; use sys.")[0]
