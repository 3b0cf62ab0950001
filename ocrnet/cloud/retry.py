"""Retries of failed calls to a store, with a limit and with pauses between them."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ocrnet.cloud.store import StoreError
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.log import ANY_RANK

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PAUSE = 60.0  # seconds between two tries


def retry(
    call: Callable[[], Result], target: str, *, retries: int, on_failure: Callable[[], None] | None = None
) -> Result:
    """Call a function; if it fails, log the failure, pause and call it again.

    Args:
        call: The function; it fails if it raises `StoreError`.
        target: The object or url, for messages.
        retries: The maximum number of retries.
        on_failure: Called before each retry, instead of logging the failure.

    Returns:
        The result of ``call``.

    Raises:
        OcrnetError: The last retry failed, or a failure is final.
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
                raise OcrnetError(f"{target}: {error}{times}") from error
            seconds = pause(tries)
            if on_failure is not None:
                on_failure()
            else:
                message = f"{target}: {error}; retrying in {seconds:.1f} s ({tries} of {retries})"
                logger.warning(message, extra=ANY_RANK)
        time.sleep(seconds)


def pause(tries: int) -> float:
    """Return the seconds to wait after ``tries`` failed tries; this is exponential backoff with random jitter."""
    return min(MAX_PAUSE, 0.5 * 2.0 ** min(tries - 1, 30)) * random.uniform(0.5, 1)
