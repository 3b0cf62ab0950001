"""Keeping MindSpore's C++ side from stderr where it says what nobody asked."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stderr_dropped() -> Iterator[None]:
    """Drop what is written to stderr within, by whatever language."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
