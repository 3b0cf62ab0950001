"""`ocrnet bench`: measure the prediction time of checkpoints and exported files, in interleaved rounds."""

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
from ocrnet.engines.tta import make_passes
from ocrnet.export import compare, formats
from ocrnet.export.open import open_for_inference
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

# The recommended row is the fastest one whose labels equal the first row's in at least this fraction of every image.
MIN_AGREEMENT = 0.99
WARMUP_ROUNDS = 2


@dataclass
class Row:
    """One file in one precision: its engine and its measurements."""

    path: Path
    mix: bool
    engine: str = ""  # the engine and its precision, for example "torch, float32"
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    labels: list[np.ndarray] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time per image, in milliseconds."""
        return statistics.median(self.milliseconds)

    def label_difference(self, first: "Row") -> float:
        """Return the fraction of pixels whose label differs from the first row's, for the image where it is largest."""
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
    paths = [checkpoint.resolve(path) for path in args.checkpoint_path]
    size = _parse_size(args.size)
    with _Workers() as workers:
        for path in paths:
            workers.open(path)
        size = size or workers.size() or Data.crop_size
        images = _load_images(args.images, size)
        print(
            f"measuring {len(workers.rows)} rows at {size[0]}x{size[1]} in {args.rounds} interleaved rounds", flush=True
        )
        for round_ in range(WARMUP_ROUNDS + args.rounds):
            for worker in workers.all:
                worker.predict(
                    images[round_ % len(images)], keep=round_ < len(images), measured=round_ >= WARMUP_ROUNDS
                )
    print(table(workers.rows))
    print(recommendation(workers.rows))
    return 0


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.strip("[]").replace("x", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) >= 32 for part in parts):
        raise OcrnetError(f"--size is '{text}', but must be height,width, each at least 32")
    return int(parts[0]), int(parts[1])


def _load_images(folder: str | None, size: tuple[int, int]) -> list[np.ndarray]:
    if folder is None:
        return [compare.draw(size, index) for index in range(2)]
    return [compare.read(path, size) for path in compare.files(folder, "--images", WARMUP_ROUNDS)]


class _Worker:
    """The process that predicts for one row.

    Each row has its own process, so that its peak memory is measured separately. The process is idle while another row
    predicts.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(child_pipe, str(row.path), row.mix), daemon=True)
        self.process.start()
        child_pipe.close()
        self.info = self._receive()
        row.engine = self.info["engine"]

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
        response = self._receive()
        self.row.peak_bytes = response["peak_bytes"]
        if keep:
            self.row.labels.append(response["labels"])
        if measured:
            self.row.milliseconds.append(1000 * response["seconds"])

    def _receive(self) -> dict[str, Any]:
        try:
            response = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise OcrnetError(
                f"{self.row.path}: the process exited with status {self.process.exitcode}, possibly out of memory; "
                "reduce --size"
            ) from None
        if "error" in response:
            raise OcrnetError(response["error"])
        return response


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
        """Start a worker for a file, and a second one in bfloat16 if the file's runtime supports that precision."""
        kind = formats.format_of(path)
        self.all.append(_Worker(Row(path, mix=False)))
        if kind in (None, "openvino") and self.all[-1].info["precision"] != "int8":
            second = _Worker(Row(path, mix=True))
            self.all.append(second)
            if "bfloat16" not in second.row.engine:
                self.all.pop().process.kill()

    def size(self) -> tuple[int, int] | None:
        """Return the (height, width) that the first file with a fixed size requires, or None."""
        return next((worker.info["size"] for worker in self.all if worker.info["size"]), None)


def serve(pipe: Connection, path: str, mix: bool) -> None:
    """Measure one file in a child process: receive images; send their labels, the prediction time and peak memory.

    The first message describes the file. An `OcrnetError` is sent as a dict with the key "error". The function returns
    when the pipe is closed.

    Args:
        pipe: The connection to the parent process.
        path: The checkpoint or exported file.
        mix: Whether to predict in mixed precision.
    """
    try:
        opened = open_for_inference(path, Config(mix=mix))
        engine, metadata = opened.engine, opened.metadata
        chosen = "bfloat16" if any(line == "mix: bfloat16" for line in engine.startup_messages) else "float32"
        precision = chosen if metadata is None or (mix and chosen == "bfloat16") else metadata.precision
        name = next(name for name in engine.versions)
        pipe.send({"engine": f"{name}, {precision}", "precision": precision, "size": metadata and metadata.size})
        while True:
            image = pipe.recv()
            start = time.perf_counter()
            labels = engine.predict(image[None], make_passes(Eval(), image.shape[:2]))["labels"][0]
            seconds = time.perf_counter() - start
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
    """Return the rows as a text table."""
    header = ("file", "engine", "ms", "images/s", "peak GiB", "labels differing")
    cells = [
        (
            row.path.name,
            row.engine,
            f"{row.median:.1f}",
            f"{1000 / row.median:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{100 * row.label_difference(rows[0]):.3f} %",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    aligned = ("<", "<", ">", ">", ">", ">")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True))
        for line in (header, *cells)
    )


def recommendation(rows: Sequence[Row]) -> str:
    """Return one line for the fastest row that agrees with the first, and another if a different row is the fastest."""
    fastest = min(rows, key=lambda row: row.median)
    recommended = min(
        (row for row in rows if row.label_difference(rows[0]) <= 1 - MIN_AGREEMENT), key=lambda row: row.median
    )
    times = f"{rows[0].median / recommended.median:.2f} times as fast as the first"
    line = (
        f"recommended: {recommended.path.name} ({recommended.engine}), {times}, with at least "
        f"{100 * MIN_AGREEMENT:.0f} % equal labels"
    )
    if fastest is recommended:
        return line
    return (
        f"{line}\nfastest: {fastest.path.name} ({fastest.engine}), {rows[0].median / fastest.median:.2f} times as "
        f"fast, but up to {100 * fastest.label_difference(rows[0]):.1f} % of an image's labels differ; evaluate it "
        "with ocrnet eval"
    )
