"""Suppression of messages that MindSpore's C++ code writes to stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def discard_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to /dev/null in the context, which discards stderr of Python and of C++ code."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)
