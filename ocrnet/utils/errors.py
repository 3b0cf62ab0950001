"""The error class whose message is printed without a traceback, and helpers for its message."""

import difflib
from collections.abc import Iterable


class OcrnetError(ValueError):
    """An error in the user's input (a key, a flag, a path, a file); the message names it and the remedy."""


def printable(text: str, most: int | None = None, *, lines: bool = False) -> str:
    """Escape text from an external source, so that it is safe to print on a terminal.

    Args:
        text: The text.
        most: The maximum number of characters to keep; None: no limit.
        lines: Whether to keep newlines.

    Returns:
        The text, in which control and other unprintable characters are replaced by escapes like ``\\x1b``.
    """
    cut = text if most is None or len(text) <= most else f"{text[:most]}…"
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in cut
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{closest[0]}'?" if closest else ""
