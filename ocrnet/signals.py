"""SIGTERM, SIGINT and SIGHUP as a request to stop at the next safe place; a second one ends the process at once."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818 - not an error
    """A run that a signal ended after saving; ``status`` is the exit status by which shells know it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """Within ``with``, calling it tells which signal asked the run to stop; outside, signals do what they did.

    Of the ranks of a run, which mostly get a signal all at once, one ``speaks``.
    """

    def __init__(self, *, speaks: bool = True, what: str = "stopping after this step, with a checkpoint") -> None:
        self.speaks, self.what = speaks, what
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        """Return the number of the signal after which to stop at the next safe place; 0 while there is none."""
        return self.number or 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
            self._before = {number: signal.signal(number, self._handle) for number in chosen}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.speaks:
            return
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # a closed terminal
            os.write(2, f"{name}: {self.what}; once more to exit at once\n".encode())
