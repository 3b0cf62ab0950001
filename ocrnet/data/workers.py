"""Start, monitor and shut down the worker processes of the data loaders of both engines."""

import atexit
import multiprocessing.connection
import multiprocessing.process
import signal
import weakref
from collections.abc import Generator, Sequence

import cv2

from ocrnet.utils.signals import SIGNALS

ADVICE = "if memory or /dev/shm is short, lower num_workers or prefetch_size (without workers: --set num_workers=0)"

_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close the data loaders that are still open at exit.

    This runs before multiprocessing waits for their workers, because the workers ignore its SIGTERM.
    """
    for made in list(_OPEN):
        made.close()


def close_at_exit(made: Generator) -> None:
    """Close a data loader when the process exits, unless it is closed earlier."""
    _OPEN.add(made)


def begin_worker(_: int = 0) -> None:
    """Limit OpenCV to one thread per worker; ignore stop signals.

    The workers provide the parallelism. Ctrl-C in a terminal and SIGTERM from a scheduler reach every process of the
    run; the main process handles them, and its exit ends the workers.
    """
    cv2.setNumThreads(0)
    for number in SIGNALS:
        # mutation: workers-ignore-signals
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def describe_dead_workers(processes: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """Return which workers ended and how, or an empty string if all are running.

    Wait up to one second for a worker that is just ending.
    """
    ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
    told = []
    for process in processes:
        if process.sentinel in ended:
            process.join(timeout=5)  # pipes close shortly before the exit status is available
        code = process.exitcode
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            told.append(f"loader worker {process.pid} {how}")
    return ", ".join(told)
