"""Retries of failed calls to a store: their number and the pauses between them."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from ocrnet.cloud.store import StoreError
from ocrnet.utils.errors import OcrnetError

Result = TypeVar("Result")

LONGEST_PAUSE = 60.0  # seconds between two tries


def retry(call: Callable[[], Result], what: str, *, retries: int, say: Callable[[str], None]) -> Result:
    """Call ``call``; after a failure, pause and retry.

    Args:
        call: The call; a `StoreError` from it is a failure.
        what: The object or url that messages name.
        retries: The maximum number of retries.
        say: Receives a line before each retry.

    Returns:
        What ``call`` returns.

    Raises:
        OcrnetError: The last try failed, or a failure was final.
    """
    tries = 0
    while True:
        try:
            return call()
        except StoreError as error:
            tries += 1
            # mutation: retry-failed-requests
            if error.final or tries > retries:
                times = f" ({tries} tries)" if tries > 1 else ""
                raise OcrnetError(f"{what}: {error}{times}") from error
            seconds = pause(tries)
            say(f"{what}: {error}; retrying in {seconds:.1f} s ({tries} of {retries})")
        time.sleep(seconds)


def pause(tries: int) -> float:
    """Return the seconds to wait after ``tries`` failed tries: exponential backoff with random jitter."""
    return min(LONGEST_PAUSE, 0.5 * 2.0 ** min(tries - 1, 30)) * random.uniform(0.5, 1)
