"""Reading and writing of video files with OpenCV, frame by frame, so that a video may be larger than memory."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from ocrnet.data.image_io import TEMPORARY_NAME_LENGTH
from ocrnet.utils.errors import OcrnetError, printable

logger = logging.getLogger(__name__)

# Suppress FFmpeg's messages: an `OcrnetError` reports the same failures.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# The number of frames in a container may be an estimate: this share of them, plus one frame, may be missing.
TOLERANCE = 0.01
FALLBACK_RATE = 25.0
_CODEC = "mp4v"


def is_safe_path(path: str | Path) -> bool:
    """Return whether OpenCV can open a path: one that is not valid UTF-8 would end the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_video(path: str | Path) -> bool:
    """Return whether OpenCV can read a frame from a file."""
    if _is_text(path):
        return False
    capture = _capture(path)
    try:
        return capture.isOpened() and capture.grab()
    finally:
        capture.release()


def _is_text(path: str | Path) -> bool:
    """Return whether a file is text, which FFmpeg would render as video or read as a playlist of files and URLs."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(4096)
        return b"\0" not in head or head.startswith((b"#EXTM3U", b"ffconcat"))
    return False


def _capture(path: str | Path) -> cv2.VideoCapture:
    with _suppress_messages():
        return cv2.VideoCapture(str(path))


@contextlib.contextmanager
def _suppress_messages() -> Iterator[None]:
    """Suppress the messages of OpenCV on stderr; an `OcrnetError` reports the failures."""
    before = cv2.getLogLevel()
    cv2.setLogLevel(0)
    try:
        yield
    finally:
        cv2.setLogLevel(before)


class Reader:
    """Context manager that reads a video; iterate over it to get the frames.

    ``rate`` is in frames per second. ``promised`` is the number of frames according to the container, 0 if unknown;
    ``frames`` is the number read so far. Raise `OcrnetError` if no frame can
    be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.frames = 0
        if not Path(path).is_file():
            raise OcrnetError(f"{path} does not exist")
        if not is_safe_path(path):
            raise OcrnetError(f"{path} has a name that is not valid UTF-8, which OpenCV cannot open; rename it")
        self._capture = cv2.VideoCapture() if _is_text(path) else _capture(path)
        self._first: np.ndarray | None
        success, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not success or self._first is None:
            self._capture.release()
            raise OcrnetError(f"{path} is damaged or not a video that OpenCV can read; convert it, for example to mp4")
        self.size = self._first.shape[0], self._first.shape[1]
        rate, promised = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else FALLBACK_RATE
        if self.rate != rate:
            logger.warning(f"{printable(str(path))} has no frame rate; {FALLBACK_RATE:g} frames per second are assumed")
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
                    f"{frame.shape[1]} at frame {self.frames}; split the video at this frame"
                )
            self.frames += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            frame = self._capture.read()[1]

    @property
    def missing(self) -> str:
        """The error message for a truncated video, else an empty text; valid after the last frame was read."""
        num_missing = self.promised - self.frames
        # mutation: detect-truncated-video
        if num_missing <= 1 + TOLERANCE * self.promised:
            return ""
        return f"{self.path} is truncated or damaged: {self.frames} of {self.promised} frames can be read"


class Writer:
    """Context manager that writes an mp4 file.

    `finish` gives the file its name; without it, the incomplete file is removed. The codec does not support odd heights
    and widths: such frames are extended by repeating the last row or column.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._draft = path.with_name(f".{path.stem[:TEMPORARY_NAME_LENGTH]}.{os.getpid()}.tmp.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0
        if not is_safe_path(path):
            raise OcrnetError(
                f"{path} has a name that is not valid UTF-8, which OpenCV cannot write; choose another --output"
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

    def write(self, image: np.ndarray) -> None:
        """Append a frame, uint8 H,W (gray) or H,W,3 RGB."""
        frame = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR if image.ndim == 2 else cv2.COLOR_RGB2BGR)
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
        """Verify that the file contains all frames, since OpenCV does not report a full disk; then give it its name."""
        self._close()
        capture = _capture(self._draft)
        num_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        # mutation: count-written-frames
        if num_frames != self._frames:
            raise OcrnetError(
                f"{self.path} cannot be written: {num_frames} of {self._frames} frames were written; the disk may "
                "be full"
            )
        try:
            os.replace(self._draft, self.path)
        except OSError as error:
            raise OcrnetError(f"{self.path} cannot be written: {error.strerror}") from None

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
