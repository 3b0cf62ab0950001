"""Handle SIGTERM, SIGINT, SIGHUP and SIGUSR1.

The first signal requests a stop at the next safe point. A second signal exits immediately.
"""

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

# Seconds in which several signals count as one request: mpirun's own SIGTERM follows a Ctrl-C in a terminal, and
# PR_SET_PDEATHSIG sends one signal for each of the parent's threads, up to 9 ms apart.
ONE_REQUEST_S = 1.0


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block `SIGNALS` in this thread while it starts threads or processes, which inherit the signal mask.

    Worker processes unblock the signals in `data.workers.begin_worker`. Threads keep them blocked, so that the main
    thread receives them.
    """
    # mutation: block-signals-while-workers-start
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def set_parent_death_signal(number: int) -> None:
    """On Linux, let the kernel send signal ``number`` to this process when its parent dies; else do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised after a run has saved its state and stopped because of a signal.

    ``status`` is the exit status: 128 plus the signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """A context manager that records the first of `SIGNALS` that arrives; on exit it restores the old handlers.

    Call it to get the number of the signal. When the signal arrives, ``message`` is printed to stderr if ``prints`` is
    True. Only one rank of a run should print, because usually all ranks receive the signal.
    """

    def __init__(
        self, *, prints: bool = True, message: str = "stopping after this step and saving a checkpoint"
    ) -> None:
        self.prints, self.message = prints, message
        self.number: int | None = None
        self._first_signal_at = 0.0
        self._old_handlers: dict[int, Any] = {}

    def __call__(self) -> int:
        """Return the number of the signal that arrived, or 0 if none arrived."""
        return self.number or 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread set handlers
            # mutation: stop-on-signal
            chosen = [
                number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
            ]  # nohup ignores SIGHUP
            self._old_handlers = {number: signal.signal(number, self._handle) for number in chosen}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            # mutation: signals-within-a-second-are-one
            if time.monotonic() - self._first_signal_at < ONE_REQUEST_S:
                return
            # mutation: second-signal-exits
            os._exit(128 + number)
        self.number, self._first_signal_at = number, time.monotonic()
        if not self.prints:
            return
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, f"{name}: {self.message}; send it again to exit immediately\n".encode())
