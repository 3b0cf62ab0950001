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

    This must run before multiprocessing sends SIGTERM to their workers and waits for them, because the workers ignore
    SIGTERM.
    """
    for loader in list(_OPEN):
        loader.close()


def close_at_exit(loader: Generator) -> None:
    """Close a data loader when the process exits, unless it is closed earlier."""
    _OPEN.add(loader)


def begin_worker(_: int = 0) -> None:
    """Initialize a worker process: limit OpenCV to one thread, and ignore stop signals.

    Parallelism comes from the number of workers. Ctrl-C in a terminal and SIGTERM from a scheduler reach every process
    of the run. The main process handles them, and its exit ends the workers.
    """
    cv2.setNumThreads(0)
    for number in SIGNALS:
        # mutation: workers-ignore-signals
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def describe_dead_workers(processes: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """Return a text with the exit status or signal of each ended worker, or an empty string if all are running.

    Wait up to one second for a worker to end.
    """
    ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
    descriptions = []
    for process in processes:
        if process.sentinel in ended:
            process.join(timeout=5)  # the exit status is available slightly later than the sentinel
        code = process.exitcode
        if code is not None:
            ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            descriptions.append(f"loader worker {process.pid} {ending}")
    return ", ".join(descriptions)
