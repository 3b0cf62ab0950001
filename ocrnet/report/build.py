"""Writing of reports: read the runs, evaluate their validation images if available, and write the pages."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ocrnet.report import card, compare, files, page, source
from ocrnet.report.compute import Figures, ReportFilter, figures
from ocrnet.report.source import Source
from ocrnet.utils.errors import OcrnetError, printable
from ocrnet.utils.signals import StopRequest

logger = logging.getLogger(__name__)

# Seconds between two reads of an unfinished run; the page is reloaded at the same interval.
INTERVAL = 5

# Config keys that --set accepts: the location of the images, and the settings of their evaluation.
SETTABLE = ("data.dataset_dir", "data.name", "data.base_size", "num_workers", "device_target", "engine", "mix", "eval.")


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command line.

    ``runs`` are the folders of the runs. ``output`` is the file to write; None selects report.html in the folder of the
    run, or for several runs comparison.html in the folder of the first. ``curves_only`` omits the evaluation.
    """

    runs: Sequence[Path]
    output: Path | None = None
    report_filter: ReportFilter = dataclasses.field(default_factory=ReportFilter)
    curves_only: bool = False


def make(options: ReportOptions) -> list[Path]:
    """Write the report and, for a single run, a model card in the same folder; return their paths.

    If the images or the network of a run are unavailable, its evaluation is omitted, and the log and the page report
    this. If an option selects the images or the checkpoint, raise `OcrnetError` instead.
    """
    _check(options)
    if options.curves_only and options.report_filter != ReportFilter():
        raise OcrnetError(
            "--curves_only omits the evaluation: --images, --checkpoint_path and --set have no effect with it"
        )
    runs = _read(options.runs)
    all_figures: list[Figures | None] = []
    not_evaluated = []
    for run in runs:
        run_figures = None if options.curves_only else _figures(run, options.report_filter)
        all_figures.append(run_figures)
        if run_figures is None:
            not_evaluated.append(run.name)
    output = _output(options)
    note = "" if options.curves_only or not not_evaluated else _omission_note(not_evaluated, len(runs))
    note = "Curves only: the validation images were not evaluated." if options.curves_only else note
    if len(runs) > 1:
        return [_write(output, compare.page(runs, all_figures, note=note))]
    written = [_write(output, page.page(runs[0], all_figures[0], note=note))]
    card_path = output.with_name("MODEL_CARD.md" if output.name == "report.html" else f"{output.stem}.MODEL_CARD.md")
    return [*written, card.write(card_path, card.card(runs[0], all_figures[0]))]


def watch(options: ReportOptions, *, interval: float = INTERVAL) -> Path:
    """Write the report without evaluation repeatedly, until the runs are finished or a signal requests a stop.

    Args:
        options: The options; its ``report_filter`` must be empty.
        interval: Seconds between two writes.

    Returns:
        The path of the report.

    Raises:
        OcrnetError: An option is not supported with --watch, or a run cannot be read.
    """
    _check(options)
    if options.report_filter != ReportFilter():
        raise OcrnetError("--watch shows only the curves: --images, --checkpoint_path and --set have no effect with it")
    output = _output(options)
    with StopRequest(message="writing the final page") as stopped:
        while True:
            start = time.monotonic()
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
            logger.info(f"{printable(str(output))}: {', '.join(_describe_progress(run) for run in runs)}")
            while not stopped() and time.monotonic() - start < interval:
                time.sleep(0.1)


def _check(options: ReportOptions) -> None:
    for name, item in options.report_filter.given.items():
        if not any(name == known or (known[-1] == "." and name.startswith(known)) for known in SETTABLE):
            raise OcrnetError(
                f"{item.source} {name}: no effect on report; supported keys: {', '.join(SETTABLE[:-1])}, eval.*"
            )
    if options.report_filter.checkpoint and len(options.runs) > 1:
        raise OcrnetError("--checkpoint_path names one checkpoint, but there are several runs; omit it")
    output = _output(options)
    if output.is_dir() or output.suffix not in (".html", ".htm"):
        raise OcrnetError(f"--output {output}: must be an HTML file, for example report.html")


def _read(folders: Sequence[Path]) -> list[Source]:
    runs = [source.read(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise OcrnetError("the same run is listed twice; list each folder once")
    if len(runs) == 1:
        return runs
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, compare.distinct(runs), strict=True)]


def _figures(run: Source, report_filter: ReportFilter) -> Figures | None:
    try:
        return figures(run, report_filter)
    except OcrnetError as error:
        if report_filter.checkpoint or report_filter.given or report_filter.images:
            raise  # the user asked for an evaluation, so a page without it would be wrong
        logger.info(f"{printable(run.name)}: images, confusion, boundaries and calibration are omitted: {error}")
        return None


def _omission_note(not_evaluated: Sequence[str], runs: int) -> str:
    of = f" of {', '.join(not_evaluated)}" if runs > 1 else ""
    return (
        f"The validation images{of} could not be evaluated, so confusion, boundaries, calibration and images "
        "are omitted. To include them: ocrnet report RUN --set data.dataset_dir=FOLDER"
    )


def _output(options: ReportOptions) -> Path:
    return options.output or options.runs[0] / ("report.html" if len(options.runs) == 1 else "comparison.html")


def _write(output: Path, text: str) -> Path:
    return files.write(output, text.encode("utf-8", "replace"))


def _describe_progress(run: Source) -> str:
    return f"{printable(run.name)} after step {run.step}" + (f"/{run.total_step}" if run.total_step else "")
