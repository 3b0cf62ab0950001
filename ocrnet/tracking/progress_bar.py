"""The progress bar of a command; it is shown only if the output is a terminal."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows ``title``, the completed steps of ``total_step``, the figures of the last log line, and the remaining time.

    Within ``with``, output to stdout appears above the bar.
    """

    def __init__(self, total_step: int, step: int, *, title: str = "train", shown: bool | None = None) -> None:
        self.shown = sys.stdout.isatty() if shown is None else shown
        self._progress = Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            disable=not self.shown,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task(title, total=total_step, completed=step, figures="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one step within a segment."""
        self._progress.advance(self._task)

    def settle(self, step: float) -> None:
        """Show the step at which a segment ended."""
        self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Show a text in place of the figures."""
        self._progress.update(self._task, figures=text)

    def figures(self, row: Mapping[str, Any]) -> None:
        """Show the figures of a training row of metrics.jsonl."""
        text = (
            f"loss {row['loss']:.3f}  lr {row['learning_rate']:.1e}  "
            f"{row['images_per_second']:.1f} img/s  {row['memory_bytes'] / 2**30:.1f} GiB"
        )
        self.say(text)
