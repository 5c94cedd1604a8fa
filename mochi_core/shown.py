"""Text of strangers, made fit for a terminal, a log and an error: tensor names, notes in files, titles in workflows, prompts."""

from __future__ import annotations

from collections.abc import Collection

NAME_LENGTH = 200
SENTENCE_LENGTH = 2000
EXAMPLES = 6
"""Names quoted in a message at most."""


def shown(text: str, longest: int = NAME_LENGTH) -> str:
    """`text` on one line, with at most `longest` characters of it.

    Whatever does not show itself is written as Python writes it in a string: line breaks, escape codes of terminals,
    characters that turn the direction of writing, and halves of surrogate pairs, which no encoding can write.
    """
    more = f" ... ({len(text):,} characters)" if len(text) > longest else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest]) + more


def sentence(message: object) -> str:
    """An error, a warning or a note on one line; the parts of it that are not ours have been cut before."""
    return shown(str(message), SENTENCE_LENGTH)


def shown_names(names: Collection[str], most: int = EXAMPLES) -> str:
    """The first few of `names`, each made fit to be shown, with commas between them and dots for the others."""
    first = [shown(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(first) + (", ..." if len(names) > most else "")


def without_advice(error: object) -> str:
    """What Python says of a number of thousands of digits, without the way to switch its limit off; other errors whole."""
    return str(error).partition("; use sys.")[0]
