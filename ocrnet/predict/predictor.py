"""Prediction of images and videos, which writes output images of each kind and the area of each class to files."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ocrnet.config import Eval
from ocrnet.data.image_io import replaced, write_png
from ocrnet.data.visualize import legend
from ocrnet.predict import video, writers
from ocrnet.predict.model import Model
from ocrnet.predict.progress import Progress
from ocrnet.predict.sources import Source
from ocrnet.predict.tiles import predict_tiled, tile_size
from ocrnet.predict.writers import AREAS, DEFAULT, DEFAULT_OF_VIDEO, EXACT, Areas, Painter
from ocrnet.utils.errors import OcrnetError, printable

logger = logging.getLogger(__name__)

# Class names are cut to this many characters in the summary.
MAX_NAME_CHARS = 60


@dataclass
class Report:
    """Result of `predict`: the area of each class, the number of finished images and videos, and the problems."""

    areas: Areas
    written: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Settings that are the same for all sources.

    ``save`` lists the kinds of output (`writers.KINDS`); None selects the default kinds. ``check`` is called between
    sources, tiles and frames, and may raise an exception to stop.
    """

    model: Model
    output: Path
    eval_cfg: Eval
    save: tuple[str, ...] | None = None
    check: Callable[[], None] = lambda: None


def predict(job: Job, sources: Sequence[Source]) -> Report:
    """Predict ``sources`` and write OUTPUT/KIND/NAME, OUTPUT/legend.png and OUTPUT/areas.json.

    An unreadable source is logged, added to the problems and skipped; if it is the only source, raise `OcrnetError`. An
    exception from ``job.check`` ends the prediction; areas.json then contains the sources that are finished.
    """
    if job.output.exists() and not job.output.is_dir():
        raise OcrnetError(f"--output '{job.output}' is a file; choose a folder")
    painter = Painter(job.model, job.save)
    report = Report(Areas(job.model.names))
    write_png(job.output / "legend.png", legend(job.model.names, job.model.palette))
    complete = False
    try:
        with Progress(len(sources)) as progress:
            for number, source in enumerate(sources, 1):
                job.check()
                position = f"[{number}/{len(sources)}]"
                try:
                    predict_one = _video if source.kind == "video" else _image
                    logger.info(printable(f"{position} {predict_one(job, painter, source, report, progress)}"))
                    report.written += 1
                except UnreadableError as error:
                    if len(sources) == 1:
                        raise
                    report.problems.append(str(error))
                    logger.warning(printable(f"{position} skipped: {error}"))
                progress.done()
        complete = True
    finally:
        if "json" in (job.save or DEFAULT) and report.areas.rows:
            report.areas.write(job.output / AREAS, complete=complete)
    return report


class UnreadableError(OcrnetError):
    """A source cannot be read; prediction continues with the next one."""


@contextlib.contextmanager
def _raise_unreadable():  # type: ignore[no-untyped-def]
    """Convert an `OcrnetError` to `UnreadableError`."""
    try:
        yield
    except OcrnetError as error:
        raise UnreadableError(str(error)) from None


def _image(job: Job, painter: Painter, source: Source, report: Report, progress: Progress) -> str:
    """Predict an image; return the line to log."""
    kinds = job.save or DEFAULT
    with _raise_unreadable():
        image = source.read()
    height, width = size = image.shape[0], image.shape[1]
    tile, start = tile_size(job.model.arch, size, job.eval_cfg), time.monotonic()
    if tile != size:
        logger.info(
            f"{printable(source.shown)}: {height}x{width} needs more than eval.max_memory "
            f"({job.eval_cfg.max_memory:g} GiB), so it is predicted in overlapping tiles of {tile[0]}x{tile[1]}"
        )

    def step(done: int, total: int) -> None:
        job.check()
        if total > 1:
            progress.part("tile", done, total, start)

    prediction = predict_tiled(job.model, image, job.eval_cfg, confidence="confidence" in kinds, step=step)
    paths = [job.output / kind / f"{source.name}.png" for kind in kinds if kind != "json"]
    for path, kind in zip(paths, (kind for kind in kinds if kind != "json"), strict=True):
        painter.write(path, kind, image, prediction)
    report.areas.add(source, size, writers.count(prediction.labels, len(job.model.names)))
    tiles = f", in {prediction.tiles} tiles" if prediction.tiles > 1 else ""
    return f"{source.shown}: {height}x{width}{tiles}{_arrow_to(paths)}"


def _video(job: Job, painter: Painter, source: Source, report: Report, progress: Progress) -> str:
    """Predict a video frame by frame; return the line to log."""
    kinds = job.save or DEFAULT_OF_VIDEO
    total = np.zeros(len(job.model.names), np.int64)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        with _raise_unreadable():
            reader = stack.enter_context(video.Reader(source.place))
        video_writers = {
            kind: stack.enter_context(video.Writer(job.output / kind / f"{source.name}.mp4", reader.rate))
            for kind in kinds
            if kind not in (*EXACT, "json")
        }
        lines = None
        if "json" in kinds:
            lines = stack.enter_context(replaced(job.output / "areas" / f"{source.name}.jsonl"))
        frames = iter(reader)
        while True:
            with _raise_unreadable():
                image = next(frames, None)
            if image is None:
                break
            prediction = predict_tiled(
                job.model, image, job.eval_cfg, confidence="confidence" in kinds, step=lambda done, total: job.check()
            )
            for kind, writer in video_writers.items():
                writer.write(painter.paint(kind, image, prediction.labels, prediction.confidence))
            for kind in set(kinds) & set(EXACT):
                painter.write(job.output / kind / source.name / f"{reader.frames - 1:06}.png", kind, image, prediction)
            pixels = writers.count(prediction.labels, len(total))
            total += pixels
            if lines is not None:
                line = {"frame": reader.frames - 1, "seconds": round((reader.frames - 1) / reader.rate, 3)}
                lines.write(writers.as_json(line | report.areas.of(pixels)) + b"\n")
            progress.part("frame", reader.frames, reader.promised, start)
        for writer in video_writers.values():
            writer.finish()
    report.areas.add(source, reader.size, total, frames=reader.frames, frames_per_second=reader.rate)
    if reader.missing:
        report.problems.append(reader.missing)
        logger.warning(printable(reader.missing))
    shape = f"{reader.size[0]}x{reader.size[1]}, {reader.frames} frames at {reader.rate:.6g} per second, without sound"
    return f"{source.shown}: {shape}{_arrow_to([writer.path for writer in video_writers.values()])}"


def _arrow_to(paths: Sequence[Path]) -> str:
    return f" -> {paths[0]}" if paths else ""


def text(report: Report) -> str:
    """Return the summary of a report as text: the share of each predicted class, largest first."""
    share = report.areas.of(report.areas.total)["share"]
    rows = [(printable(name, MAX_NAME_CHARS), part) for name, part in share.items()]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {100 * part:6.2f} % of the pixels" for name, part in rows)
