"""The progress bar of a command; by default it is shown only if stdout is a terminal."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows ``title``, the completed steps of ``total_step``, a text or the latest metrics, and the remaining time.

    Within ``with``, output to stdout appears above the bar. ``shown`` overrides whether the bar is shown.
    """

    def __init__(self, total_step: int, step: int, *, title: str = "train", shown: bool | None = None) -> None:
        self.shown = sys.stdout.isatty() if shown is None else shown
        self._progress = Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            disable=not self.shown,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task(title, total=total_step, completed=step, metrics="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Add one completed step."""
        self._progress.advance(self._task)

    def set_step(self, step: float) -> None:
        """Set the number of completed steps."""
        self._progress.update(self._task, completed=step)

    def show_text(self, text: str) -> None:
        """Show a text in place of the metrics."""
        self._progress.update(self._task, metrics=text)

    def show_row(self, row: Mapping[str, Any]) -> None:
        """Show loss, learning rate, images per second and memory of a training row of metrics.jsonl."""
        text = (
            f"loss {row['loss']:.3f}  lr {row['learning_rate']:.1e}  "
            f"{row['images_per_second']:.1f} img/s  {row['memory_bytes'] / 2**30:.1f} GiB"
        )
        self.show_text(text)
