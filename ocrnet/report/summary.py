"""The summary of a run, from which the page, the comparison and the model card are written."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ocrnet.data.datasets.base import colors
from ocrnet.report.compute import Figures
from ocrnet.report.figures import plain
from ocrnet.report.source import Row, Source

Number = float | None


@dataclass(frozen=True)
class ClassLine:
    """The scores of one class, from 0 to 1; None if no pixel determines the score."""

    name: str
    color: tuple[int, ...]
    iou: Number
    accuracy: Number
    share: Number
    boundary: Number = None


@dataclass(frozen=True)
class Summary:
    """The results of a run; ``origin`` describes the evaluation that they come from, and is empty without one."""

    name: str
    network: str
    dataset: str
    origin: str
    mean_iou: Number
    pixel_accuracy: Number
    mean_accuracy: Number
    boundary: Number
    calibration: Number
    classes: tuple[ClassLine, ...]
    step: int
    total_step: int | None
    images_per_second: Number
    waiting: Number  # share of a step's time spent waiting for data
    memory_bytes: Number


def summary(run: Source, figures: Figures | None) -> Summary:
    """Return the summary of a run, with the scores of its figures, else of its recorded evaluations."""
    facts = figures.facts if figures else {}
    known: dict[str, Any] = {"boundary": None, "calibration": None}
    if figures:
        scores = figures.scores
        edges = [value for value in facts["boundary"] if value is not None]
        known = {
            "origin": f"{facts['images']:,} of {facts['of']:,} validation images, {facts['checkpoint']}, "
            f"{_describe_eval(facts)}",
            "mean_iou": plain(scores.mean_iou),
            "pixel_accuracy": plain(scores.pixel_accuracy),
            "mean_accuracy": plain(scores.mean_accuracy),
            "boundary": statistics.fmean(edges) if edges else None,
            "calibration": facts["calibration"]["error"],
        }
        columns = zip(scores.iou, scores.accuracy, scores.share, facts["boundary"], strict=True)
        rows = [(plain(iou), plain(accuracy), plain(share), edge) for iou, accuracy, share, edge in columns]
        lines = [
            ClassLine(name, tuple(color), *row)
            for name, color, row in zip(facts["names"], facts["palette"], rows, strict=True)
        ]
    else:
        row, known["origin"] = _best(run)
        known |= {name: number(row.get(name)) for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}
        lines = _lines(row.get("classes"))
    return Summary(
        name=run.name,
        network=_network(run, facts),
        dataset=str(facts.get("dataset") or run.config.get("data.name") or ""),
        classes=tuple(lines),
        step=max(run.step, facts.get("step", 0)),
        total_step=run.total_step,
        images_per_second=_median(run.train, "images_per_second"),
        waiting=_median([{"part": share} for share in waiting(run.train)], "part"),
        memory_bytes=max((value for row in run.train if (value := number(row.get("memory_bytes")))), default=None),
        **known,
    )


def number(value: Any) -> Number:
    """Return the value if it is a finite number, else None."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


def waiting(rows: Sequence[Row]) -> list[Number]:
    """Return, for each row, the share of a step's time spent waiting for data."""
    pairs = [(number(row.get("data_seconds_per_step")), number(row.get("seconds_per_step"))) for row in rows]
    return [data / whole if data is not None and whole else None for data, whole in pairs]


def percent(value: Number, digits: int = 2) -> str:
    """Return a fraction as percent without the percent sign; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _best(run: Source) -> tuple[Row, str]:
    """Return the recorded evaluation to report and its origin.

    It is the last one of ocrnet eval, else the one with the highest mIoU during training, else empty.
    """
    if run.scored:
        row = run.scored[-1]
        checkpoint = str(row.get("checkpoint", "")).rsplit("/", 1)[-1]
        scales = {"scales": row.get("scales", [1.0]), "flip": row.get("flip", False), "slide": row.get("slide")}
        return row, f"ocrnet eval, {checkpoint or 'unknown checkpoint'}, {_describe_eval({'eval': scales})}"
    rows = [row for row in run.evals if number(row.get("mean_iou")) is not None]
    if not rows:
        return {}, ""
    best = max(rows, key=lambda row: row["mean_iou"])
    return best, f"the best evaluation during training, after step {best['step']:,}"


def _describe_eval(facts: dict[str, Any]) -> str:
    settings = facts["eval"]
    scales = settings["scales"] if isinstance(settings["scales"], list) else [settings["scales"]]
    size = "single scale" if scales == [1.0] else "scales " + " ".join(f"{scale}" for scale in scales)
    windows = "" if not settings["slide"] else ", sliding windows of {}".format("x".join(map(str, settings["slide"])))
    return size + (" with flip" if settings["flip"] else "") + windows


def _lines(classes: Any) -> list[ClassLine]:
    if not isinstance(classes, dict):
        return []
    palette = itertools.cycle(colors())
    return [
        ClassLine(str(name), color, *(number(row.get(key)) for key in ("iou", "accuracy", "share")))
        for (name, row), color in zip(classes.items(), palette, strict=False)
        if isinstance(row, dict)
    ]


def _network(run: Source, facts: dict[str, Any]) -> str:
    width = facts.get("arch", {}).get("width") or run.config.get("backbone.width")
    text = f"OCRNet-HRNet-W{width}" if width else "OCRNet"
    return f"{text}, {facts['parameters'] / 1e6:.2f} M parameters" if "parameters" in facts else text


def _median(rows: Sequence[Row], name: str) -> Number:
    values = [value for row in rows if (value := number(row.get(name))) is not None]
    return statistics.median(values) if values else None
