"""Progress of `ocrnet predict` and `ocrnet submit`: a progress bar on a terminal, else a line every ten seconds."""

import logging
import time
from types import TracebackType

from ocrnet.tracking.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

EVERY_SECONDS = 10.0


class Progress:
    """Shows the progress over ``total`` items and over the parts of the current item, its tiles or frames.

    Args:
        total: The number of items.
        unit: The name of the items.
        shown: Whether to show a bar; None shows one on a terminal.
    """

    def __init__(self, total: int, *, unit: str = "images", shown: bool | None = None) -> None:
        self._total, self._unit = total, unit
        self._bar = ProgressBar(total, 0, title="predict", shown=shown)
        self._start = self._last_logged = time.monotonic()
        self._done = 0

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)

    def done(self) -> None:
        """Count one item as done."""
        self._done += 1
        elapsed = time.monotonic() - self._start
        self._show(self._done, f"{self._done}/{self._total} {self._unit}, {_rate(self._done, elapsed)} {self._unit}/s")

    def part(self, part_name: str, number: int, total: int, start: float) -> None:
        """Show the progress within the current item.

        Args:
            part_name: The name of a part: tile or frame.
            number: The number of parts that are done.
            total: The number of all parts; 0 if unknown.
            start: The `time.monotonic` time at which the item started.
        """
        rate = _rate(number, time.monotonic() - start)
        of_total = f"/{max(total, number)}" if total else ""
        share = min(1.0, number / total) if total else 0.0
        self._show(self._done + share, f"{part_name}s {number}{of_total}, {rate} {part_name}s/s")

    def _show(self, done: float, text: str) -> None:
        self._bar.set_step(done)
        self._bar.show_text(text)
        now = time.monotonic()
        if self._bar.shown or now - self._last_logged < EVERY_SECONDS or done >= self._total:
            return
        self._last_logged = now
        remaining = (now - self._start) * (self._total - done) / done if done else None
        logger.info(text if remaining is None else f"{text}, about {duration(remaining)} left")


def _rate(number: int, seconds: float) -> str:
    return f"{number / max(seconds, 1e-6):.3g}"


def duration(seconds: float) -> str:
    """Return seconds as ``1:08`` or ``2:01:08``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
