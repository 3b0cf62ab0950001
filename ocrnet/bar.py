"""The progress bar of a training run, where the output is a terminal; elsewhere the log lines are enough."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Steps done of ``total_step``, the last log line's figures, and the time that is left.

    Within ``with``, what is printed to stdout appears above the bar.
    """

    def __init__(self, total_step: int, step: int, *, shown: bool | None = None) -> None:
        shown = sys.stdout.isatty() if shown is None else shown
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            disable=not shown,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("train", total=total_step, completed=step, figures="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one step within a segment."""
        self._progress.advance(self._task)

    def settle(self, step: int) -> None:
        """Show the step that a segment ended at."""
        self._progress.update(self._task, completed=step)

    def figures(self, row: Mapping[str, Any]) -> None:
        """Show the figures of a training row of metrics.jsonl."""
        text = (
            f"loss {row['loss']:.3f}  lr {row['learning_rate']:.1e}  "
            f"{row['images_per_second']:.1f} img/s  {row['memory_bytes'] / 2**30:.1f} GiB"
        )
        self._progress.update(self._task, figures=text)
