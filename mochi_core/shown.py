"""Make untrusted text safe for terminals, logs and errors: tensor names, file metadata, workflow titles, prompts."""

from __future__ import annotations

from collections.abc import Collection

NAME_LENGTH = 200
SENTENCE_LENGTH = 2000
EXAMPLES = 6
"""Most names quoted in a message."""


def shown(text: str, longest: int = NAME_LENGTH) -> str:
    """`text` on one line, cut to its first `longest` characters.

    Non-printable characters are escaped as in a Python string: line breaks, terminal escape codes, characters that change the
    writing direction, and lone surrogates, which cannot be encoded.
    """
    more = f" ... ({len(text):,} characters)" if len(text) > longest else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest]) + more


def sentence(message: object) -> str:
    """An error, warning or note on one line; any untrusted parts of it have already been cut."""
    return shown(str(message), SENTENCE_LENGTH)


def shown_names(names: Collection[str], most: int = EXAMPLES) -> str:
    """The first few of `names`, each made safe to show, separated by commas, with dots for the rest."""
    first = [shown(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(first) + (", ..." if len(names) > most else "")


def without_advice(error: object) -> str:
    """Python's error about a number with thousands of digits, without its advice to lift the limit; other errors unchanged."""
    return str(error).partition("; use sys.")[0]
