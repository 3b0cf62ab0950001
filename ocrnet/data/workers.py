"""What every engine's loader does with its worker processes: start them undisturbed, tell of their deaths, end them."""

import atexit
import multiprocessing.connection
import multiprocessing.process
import signal
import weakref
from collections.abc import Generator, Sequence

import cv2

from ocrnet.utils.signals import SIGNALS

ADVICE = "where memory or /dev/shm is short, lower num_workers or prefetch_size (without workers: --set num_workers=0)"

_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """End the workers of loaders left open, before multiprocessing waits for them: they ignore its SIGTERM."""
    for made in list(_OPEN):
        made.close()


def close_at_exit(made: Generator) -> None:
    """Have a loader closed when the process ends, where nobody closed it before."""
    _OPEN.add(made)


def begin_worker(_: int = 0) -> None:
    """Keep a worker to one thread, as the workers are the parallelism, and to its work when the run is asked to stop.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach every process of the run; the run itself answers them, and its
    end ends the workers.
    """
    cv2.setNumThreads(0)
    for number in SIGNALS:
        # mutation: workers-ignore-signals
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def describe_dead_workers(processes: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """Return which workers died of what, after a moment for a death that is just happening; empty where none did."""
    ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
    told = []
    for process in processes:
        if process.sentinel in ended:
            process.join(timeout=5)  # its pipes close a little before its status is to be had
        code = process.exitcode
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            told.append(f"loader worker {process.pid} {how}")
    return ", ".join(told)
