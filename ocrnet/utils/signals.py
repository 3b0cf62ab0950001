"""Handle SIGTERM, SIGINT, SIGHUP and SIGUSR1: the first requests a stop at a safe point, a second one exits."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

PR_SET_PDEATHSIG = 1

# One request may arrive as several signals: mpirun's own SIGTERM follows a Ctrl-C in a terminal, and PR_SET_PDEATHSIG
# sends one signal for each of the parent's threads, up to 9 ms apart.
ONE_REQUEST_S = 1.0


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals that stop a run while threads or processes start; each inherits the signal mask.

    A worker unblocks them in `data.workers.begin_worker`; a thread keeps them blocked, so that the main thread
    receives them.
    """
    # mutation: block-signals-while-workers-start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_parent_death_signal(number: int) -> None:
    """Request signal ``number`` for this process when its parent dies (Linux); do nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised when a signal ended a run after saving; ``status`` is the exit status, 128 plus the signal number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """A context manager that records which signal asked the run to stop; on exit it restores the old handlers.

    Call it to get the signal's number. The ranks of a run usually receive a signal at the same time, so only one of
    them ``speaks``, which means that it prints a message with ``what``.
    """

    def __init__(self, *, speaks: bool = True, what: str = "stopping after this step and saving a checkpoint") -> None:
        self.speaks, self.what = speaks, what
        self.number: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        """Return the number of the signal that asked the run to stop at the next safe point; 0 if there was none."""
        return self.number or 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread set handlers
            # mutation: stop-on-signal
            chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
            self._before = {number: signal.signal(number, self._handle) for number in chosen}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            # mutation: signals-within-a-second-are-one
            if time.monotonic() - self._asked_at < ONE_REQUEST_S:
                return
            # mutation: second-signal-exits
            os._exit(128 + number)
        self.number, self._asked_at = number, time.monotonic()
        if not self.speaks:
            return
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, f"{name}: {self.what}; send it again to exit immediately\n".encode())
