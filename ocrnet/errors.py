"""The one error that a user sees without a traceback, and the spelling help it carries."""

import difflib
from collections.abc import Iterable


class OcrnetError(ValueError):
    """A mistake in what the user gave (a key, a flag, a path, a file); the message says which and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
