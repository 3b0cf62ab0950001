"""The files of TensorBoard, written by the run's own thread: a full disk is an error then, not a hang."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Let an import find no PyTorch, unless it is there already: tensorboardX takes its seconds and memory unasked."""
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
    """One event file in ``folder``; what TensorBoard shows of an earlier start after ``step`` is dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        log = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=log))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add one value of a curve."""
        self._write(summary.scalar(name, value), step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture, uint8 H,W,3 RGB."""
        self._write(summary.image(name, picture, dataformats="HWC"), step)

    def flush(self) -> None:
        """Bring what was added to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Bring everything to the disk and close the file."""
        self._writer.close()

    def _write(self, content: Summary, step: int) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=content))
