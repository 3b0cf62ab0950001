"""Read and write video files with OpenCV, frame by frame.

A video may be larger than memory. An incomplete output never gets its final name.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from ocrnet.data.image_io import TEMPORARY_NAME_LENGTH
from ocrnet.utils.errors import OcrnetError

# Silence FFmpeg's own messages, which OpenCV passes on: they repeat the `OcrnetError` less clearly.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# The length given by a container may be an estimate: this share of its frames, plus one frame, may be missing.
TOLERANCE = 0.01
FALLBACK_RATE = 25.0
_CODEC = "mp4v"


def can_take(path: str | Path) -> bool:
    """Return whether a path is safe for OpenCV: a path that is not UTF-8 ends the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def opens(path: str | Path) -> bool:
    """Return whether OpenCV finds a first frame in a file."""
    if _is_text(path):
        return False
    capture = _capture(path)
    try:
        return capture.isOpened() and capture.grab()
    finally:
        capture.release()


def _is_text(path: str | Path) -> bool:
    """Return whether a file is text: FFmpeg renders text as video, or follows a playlist to other files and URLs."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(4096)
        return b"\0" not in head or head.startswith((b"#EXTM3U", b"ffconcat"))
    return False


def _capture(path: str | Path) -> cv2.VideoCapture:
    with _quiet():
        return cv2.VideoCapture(str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of OpenCV on stderr about failures that raise `OcrnetError` here."""
    before = cv2.getLogLevel()
    cv2.setLogLevel(0)
    try:
        yield
    finally:
        cv2.setLogLevel(before)


class Reader:
    """Context manager that reads a video; iterate over it to get the frames.

    ``rate`` is in frames per second; ``promised`` is the number of frames given by the container (0: unknown).
    ``notes`` describe assumptions. Raise `OcrnetError` if there is no first frame.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.frames = 0
        if not Path(path).is_file():
            raise OcrnetError(f"{path} does not exist")
        if not can_take(path):
            raise OcrnetError(f"{path} has a name that is not valid UTF-8, and OpenCV cannot open it; rename it")
        self._capture = cv2.VideoCapture() if _is_text(path) else _capture(path)
        self._first: np.ndarray | None
        found, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not found or self._first is None:
            self._capture.release()
            raise OcrnetError(f"{path} is damaged or not a video that OpenCV can read; convert it, for example to mp4")
        self.size = self._first.shape[0], self._first.shape[1]
        rate, promised = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else FALLBACK_RATE
        if self.rate != rate:
            self.notes.append(f"{path} has no frame rate; {FALLBACK_RATE:g} frames per second are assumed")
        self.promised = int(promised) if math.isfinite(promised) and promised > 0 else 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 H,W,3 RGB, all of one size."""
        frame = self._first
        while frame is not None:
            if frame.shape[:2] != self.size:
                raise OcrnetError(
                    f"{self.path} changes its size from {self.size[0]}x{self.size[1]} to {frame.shape[0]}x"
                    f"{frame.shape[1]} at frame {self.frames}; split it there"
                )
            self.frames += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            frame = self._capture.read()[1]

    @property
    def missing(self) -> str:
        """Error text for a truncated video, otherwise empty; valid after the last frame is read."""
        lacking = self.promised - self.frames
        # mutation: detect-truncated-video
        if lacking <= 1 + TOLERANCE * self.promised:
            return ""
        return f"{self.path} is truncated or damaged: {self.frames} of {self.promised} frames can be read"


class Writer:
    """Context manager that writes an mp4; it gets its name only in `finish`, and is removed otherwise.

    The codec does not support odd heights and widths: such frames are extended by repeating the last row or column.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._draft = path.with_name(f".{path.stem[:TEMPORARY_NAME_LENGTH]}.{os.getpid()}.tmp.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0
        if not can_take(path):
            raise OcrnetError(
                f"{path} has a name that is not valid UTF-8, and OpenCV cannot write to it; give another --output"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._draft.touch()
        except OSError as error:
            raise OcrnetError(f"{path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        # mutation: remove-unfinished-video
        self._draft.unlink(missing_ok=True)

    def write(self, picture: np.ndarray) -> None:
        """Append a frame, uint8 H,W (gray) or H,W,3 RGB."""
        frame = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR if picture.ndim == 2 else cv2.COLOR_RGB2BGR)
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*_CODEC)
            self._writer = cv2.VideoWriter(str(self._draft), codec, self.rate, (frame.shape[1], frame.shape[0]))
            if not self._writer.isOpened():
                raise OcrnetError(f"{self.path}: OpenCV cannot write {frame.shape[0]}x{frame.shape[1]} as {_CODEC}")
        self._writer.write(frame)
        self._frames += 1

    def finish(self) -> None:
        """Verify that the file contains all frames, and rename it: OpenCV does not report a full disk."""
        self._close()
        capture = _capture(self._draft)
        there = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        # mutation: count-written-frames
        if there != self._frames:
            raise OcrnetError(
                f"{self.path} cannot be written: {there} of {self._frames} frames were written; is the disk full?"
            )
        try:
            os.replace(self._draft, self.path)
        except OSError as error:
            raise OcrnetError(f"{self.path} cannot be written: {error.strerror}") from None

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
