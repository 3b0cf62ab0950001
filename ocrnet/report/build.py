"""The command report: read the runs, evaluate their validation images if available, write the pages."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ocrnet.report import card, compare, files, page, source
from ocrnet.report.compute import Figures, ReportFilter, figures
from ocrnet.report.source import Source
from ocrnet.utils.errors import OcrnetError, printable
from ocrnet.utils.signals import StopRequest

# Seconds between two reads of an unfinished run; the page reloads at the same interval.
INTERVAL = 5

# Config keys that the command line may set: the location of the images, and how they are evaluated.
SETTABLE = ("data.dataset_dir", "data.name", "data.base_size", "num_workers", "device_target", "engine", "mix", "eval.")

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command line.

    ``output`` None means report.html in the run's folder, or comparison.html in the first run's folder if there are
    several. ``curves_only``: do not evaluate the images.
    """

    runs: Sequence[Path]
    output: Path | None = None
    report_filter: ReportFilter = dataclasses.field(default_factory=ReportFilter)
    curves_only: bool = False


def make(options: ReportOptions, say: Say) -> list[Path]:
    """Write the report and, for a single run, MODEL_CARD.md in the same folder; return the files.

    If a run's images or network are unavailable, its part is omitted; the log and the page state this. Raise
    OcrnetError instead if options select the images or the checkpoint.
    """
    _check(options)
    if options.curves_only and options.report_filter != ReportFilter():
        raise OcrnetError(
            "--curves_only does not evaluate images: --images, --checkpoint_path and --set have no effect with it"
        )
    runs = _read(options.runs)
    found: list[Figures | None] = []
    missing = []
    for run in runs:
        made = None if options.curves_only else _figures(run, options.report_filter, say)
        found.append(made)
        if made is None:
            missing.append(run.name)
    output = _output(options)
    note = "" if options.curves_only or not missing else _without(missing, len(runs))
    note = "Curves only: the validation images were not evaluated." if options.curves_only else note
    if len(runs) > 1:
        return [_write(output, compare.page(runs, found, note=note))]
    written = [_write(output, page.page(runs[0], found[0], note=note))]
    beside = output.with_name("MODEL_CARD.md" if output.name == "report.html" else f"{output.stem}.MODEL_CARD.md")
    return [*written, card.write(beside, card.card(runs[0], found[0]))]


def watch(options: ReportOptions, say: Say, *, interval: float = INTERVAL) -> Path:
    """Write the page of the curves periodically, until the runs are done or a signal requests a stop.

    Args:
        options: The options; its ``report_filter`` must be empty.
        say: Logs a line of progress.
        interval: Seconds between two writes.

    Returns:
        The file.

    Raises:
        OcrnetError: An option has no effect here, or a run cannot be read.
    """
    _check(options)
    if options.report_filter != ReportFilter():
        raise OcrnetError("--watch shows only the curves: --images, --checkpoint_path and --set have no effect with it")
    output = _output(options)
    with StopRequest(message="writing the final page") as stopped:
        while True:
            began = time.monotonic()
            runs = _read(options.runs)
            done = all(run.finished for run in runs) or bool(stopped())
            refresh = None if done else max(1, round(interval))
            if len(runs) > 1:
                text = compare.page(runs, [None] * len(runs), refresh=refresh)
            else:
                text = page.page(runs[0], None, refresh=refresh)
            _write(output, text)
            if done:
                return output
            say(f"{printable(str(output))}: {', '.join(_progress(run) for run in runs)}")
            while not stopped() and time.monotonic() - began < interval:
                time.sleep(0.1)


def _check(options: ReportOptions) -> None:
    for name, item in options.report_filter.given.items():
        if not any(name == known or (known[-1] == "." and name.startswith(known)) for known in SETTABLE):
            raise OcrnetError(
                f"{item.source} {name}: no effect on report; supported keys: {', '.join(SETTABLE[:-1])}, eval.*"
            )
    if options.report_filter.checkpoint and len(options.runs) > 1:
        raise OcrnetError("--checkpoint_path names one checkpoint, but several runs are given; omit it")
    output = _output(options)
    if output.is_dir() or output.suffix not in (".html", ".htm"):
        raise OcrnetError(f"--output {output}: must be an HTML file, for example report.html")


def _read(folders: Sequence[Path]) -> list[Source]:
    runs = [source.read(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise OcrnetError("a run is given twice; name each folder once")
    if len(runs) == 1:
        return runs
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, compare.distinct(runs), strict=True)]


def _figures(run: Source, report_filter: ReportFilter, say: Say) -> Figures | None:
    try:
        return figures(run, report_filter, say)
    except OcrnetError as error:
        if report_filter.checkpoint or report_filter.given or report_filter.images:
            raise  # an explicit request must not result in a page that lacks it
        say(f"{printable(run.name)}: images, confusion, boundaries and calibration are omitted: {error}")
        return None


def _without(missing: Sequence[str], runs: int) -> str:
    of = f" of {', '.join(missing)}" if runs > 1 else ""
    return (
        f"The validation images{of} could not be evaluated, so confusion, boundaries, calibration and pictures "
        "are omitted. To include them: ocrnet report RUN --set data.dataset_dir=FOLDER"
    )


def _output(options: ReportOptions) -> Path:
    return options.output or options.runs[0] / ("report.html" if len(options.runs) == 1 else "comparison.html")


def _write(output: Path, text: str) -> Path:
    return files.write(output, text.encode("utf-8", "replace"))


def _progress(run: Source) -> str:
    return f"{printable(run.name)} after step {run.step}" + (f"/{run.total_step}" if run.total_step else "")
