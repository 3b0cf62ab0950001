"""`ocrnet bench`: measure the prediction time of checkpoints and exported files, which take turns."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.cli.common import Parser
from ocrnet.config import Config, Data, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.tta import make_passes
from ocrnet.export import compare, formats
from ocrnet.export.formats import Exported
from ocrnet.export.open import as_weights, open_engine, read
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

# The fastest file that shares at least this fraction of every image's labels with the first file is recommended.
SAME = 0.99
WARMUPS = 2


@dataclass
class Row:
    """One file in one precision: its description and its measurements."""

    path: Path
    mix: bool
    what: str = ""
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    labels: list[np.ndarray] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time per image, in milliseconds."""
        return statistics.median(self.milliseconds)

    def unlike(self, first: "Row") -> float:
        """Return the largest fraction of an image's pixels whose label differs from the first row's."""
        return max(float((a != b).mean()) for a, b in zip(self.labels, first.labels, strict=True))


def main(argv: Sequence[str]) -> int:
    """Print the prediction time, peak memory and label differences of checkpoints and exported files."""
    parser = Parser(prog="ocrnet bench", description=main.__doc__, allow_abbrev=False)
    what = "checkpoints, run folders or exported files; each is compared with the first"
    parser.add_argument("--checkpoint_path", "--ckpt_path", nargs="+", required=True, metavar="FILE", help=what)
    parser.add_argument("--size", metavar="H,W", help="height and width (default: of a fixed-size file, else 512,1024)")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of images to predict (default: synthetic street scenes)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds, in which each file predicts once (default: 5)"
    )
    args = parser.parse_args(list(argv))
    if args.rounds < 1:
        raise OcrnetError(f"--rounds is {args.rounds}, but must be at least 1")
    paths = [checkpoint.resolve(path)[0] for path in args.checkpoint_path]
    size = _size(args.size)
    with _Workers() as workers:
        for path in paths:
            workers.open(path)
        size = size or workers.size() or Data.crop_size
        images = _images(args.images, size)
        print(f"measuring {len(workers.rows)} at {size[0]}x{size[1]}, {args.rounds} rounds, interleaved", flush=True)
        for round_ in range(WARMUPS + args.rounds):
            for worker in workers.all:
                worker.predict(images[round_ % len(images)], keep=round_ < len(images), measured=round_ >= WARMUPS)
    print(table(workers.rows))
    print(recommendation(workers.rows))
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.strip("[]").replace("x", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) >= 32 for part in parts):
        raise OcrnetError(f"--size is '{text}', but must be height,width, each at least 32")
    return int(parts[0]), int(parts[1])


def _images(folder: str | None, size: tuple[int, int]) -> list[np.ndarray]:
    if folder is None:
        return [compare.draw(size, index) for index in range(2)]
    return [compare.read(path, size) for path in compare.files(folder, "--images", WARMUPS)]


class _Worker:
    """The process of one row.

    Each row has a separate process, so that its memory is measured separately. The process is idle while other rows
    take their turn.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(row.path), row.mix), daemon=True)
        self.process.start()
        theirs.close()
        self.about = self._answer()
        row.what = self.about["what"]

    def predict(self, image: np.ndarray, *, keep: bool, measured: bool) -> None:
        """Predict an image in the row's process and record the peak memory.

        Args:
            image: The image, uint8 H,W,3 RGB.
            keep: Whether to append the labels to the row.
            measured: Whether to append the time to the row.

        Raises:
            OcrnetError: The process ended or reported an error.
        """
        self.pipe.send(image)
        answer = self._answer()
        self.row.peak_bytes = answer["peak_bytes"]
        if keep:
            self.row.labels.append(answer["labels"])
        if measured:
            self.row.milliseconds.append(1000 * answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise OcrnetError(
                f"{self.row.path}: the process exited with status {self.process.exitcode}, possibly out of memory; "
                "give a smaller --size"
            ) from None
        if "error" in answer:
            raise OcrnetError(answer["error"])
        return answer


class _Workers:
    """The processes of all rows; they are killed at the end of the ``with`` block."""

    def __init__(self) -> None:
        self.all: list[_Worker] = []

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            worker.process.kill()
            worker.process.join()

    @property
    def rows(self) -> list[Row]:
        return [worker.row for worker in self.all]

    def open(self, path: Path) -> None:
        """Open a file, and open it a second time in bfloat16 if that precision can be chosen at run time."""
        kind = formats.format_of(path)
        self.all.append(_Worker(Row(path, mix=False)))
        if kind in (None, "openvino") and self.all[-1].about["precision"] != "int8":
            second = _Worker(Row(path, mix=True))
            self.all.append(second)
            if "bfloat16" not in second.row.what:
                self.all.pop().process.kill()

    def size(self) -> tuple[int, int] | None:
        """Return the (height, width) that the first file with a fixed size requires, or None."""
        return next((worker.about["size"] for worker in self.all if worker.about["size"]), None)


def serve(pipe: Connection, path: str, mix: bool) -> None:
    """Run the process of one row: receive images, and send labels, seconds and peak memory.

    The first object sent is the description of the file. An `OcrnetError` is sent as a dict with the key "error". The
    process ends when the pipe is closed.

    Args:
        pipe: The connection to the parent process.
        path: The checkpoint or exported file.
        mix: Whether to predict in mixed precision.
    """
    try:
        cfg = Config(device_target=None, mix=mix)
        given = read(Path(path), cfg)
        found = as_weights(given)
        engine = open_engine(cfg, given, world=World())
        engine.restore(found.tensors, 0)
        metadata = given.metadata if isinstance(given, Exported) else None
        half = "bfloat16" if any(line == "mix: bfloat16" for line in engine.startup_messages) else "float32"
        precision = half if metadata is None or (mix and half == "bfloat16") else metadata.precision
        name = next(name for name in engine.versions)
        pipe.send({"what": f"{name}, {precision}", "precision": precision, "size": metadata and metadata.size})
        while True:
            image = pipe.recv()
            begun = time.perf_counter()
            labels = engine.predict(image[None], make_passes(Eval(), image.shape[:2]))["labels"][0]
            seconds = time.perf_counter() - begun
            pipe.send({"labels": labels, "seconds": seconds, "peak_bytes": peak_bytes()})
    except OcrnetError as error:
        pipe.send({"error": str(error)})
    except (EOFError, KeyboardInterrupt):
        pass


def peak_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a text table."""
    head = ("file", "computed by", "ms", "images/s", "peak GiB", "labels differing")
    cells = [
        (
            row.path.name,
            row.what,
            f"{row.median:.1f}",
            f"{1000 / row.median:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{100 * row.unlike(rows[0]):.3f} %",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    aligned = ("<", "<", ">", ">", ">", ">")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True))
        for line in (head, *cells)
    )


def recommendation(rows: Sequence[Row]) -> str:
    """Return which row to use: the fastest that agrees with the first, and the fastest of all if it is another."""
    fastest = min(rows, key=lambda row: row.median)
    same = min((row for row in rows if row.unlike(rows[0]) <= 1 - SAME), key=lambda row: row.median)
    times = f"{rows[0].median / same.median:.2f} times as fast as the first"
    said = f"recommended: {same.path.name} ({same.what}), {times}, with at least {100 * SAME:.0f} % equal labels"
    if fastest is same:
        return said
    return (
        f"{said}\nfastest: {fastest.path.name} ({fastest.what}), {rows[0].median / fastest.median:.2f} times as "
        f"fast, but up to {100 * fastest.unlike(rows[0]):.1f} % of an image's labels differ: run ocrnet eval on it"
    )
