"""TensorBoard event files. They are written in the caller's thread, so that a full disk raises an error."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide PyTorch from imports, unless it is already imported.

    Otherwise tensorboardX imports PyTorch without need, which takes seconds and memory.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary


class TensorBoardWriter:
    """Writes one event file to ``folder``; TensorBoard discards the points after ``step`` of an earlier start."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        log = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=log))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one point to a curve.

        Args:
            name: The curve's name.
            value: The point's value.
            step: The number of completed steps.
        """
        self._write(summary.scalar(name, value), step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an image.

        Args:
            name: The image's name.
            image: uint8 H,W,3 RGB.
            step: The number of completed steps.
        """
        self._write(summary.image(name, image, dataformats="HWC"), step)

    def flush(self) -> None:
        """Flush the added points and images to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush everything to disk and close the file."""
        self._writer.close()

    def _write(self, content: Summary, step: int) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=content))
