"""The one error that a user sees without a traceback, and the spelling help it carries."""

import difflib
from collections.abc import Iterable


class OcrnetError(ValueError):
    """A mistake in what the user gave (a key, a flag, a path, a file); the message says which and what to do."""


def printable(text: str, most: int | None = None, *, lines: bool = False) -> str:
    """Return what someone else named as a terminal may show it: no control characters, nothing that is no character.

    They become escapes like ``\\x1b``, newlines too unless ``lines``; what is longer than ``most`` characters is cut.
    """
    cut = text if most is None or len(text) <= most else f"{text[:most]}…"
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in cut
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
