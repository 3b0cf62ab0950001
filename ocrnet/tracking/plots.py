"""Plots of a run's metrics.jsonl: losses, validation scores and learning rate over the steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


def read(metrics: Path) -> tuple[Rows, Rows]:
    """Return the training rows and the evaluation rows of a metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "eval"]


def draw(metrics: Path, path: Path) -> None:
    """Plot the curves of ``metrics`` (a metrics.jsonl) and write them to ``path`` as PNG."""
    train, evaluations = read(metrics)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, rates = figure.subplots(1, 3)
    for name, label in (("loss", "loss"), ("loss_ocr", "OCR head"), ("loss_aux", "auxiliary head")):
        _line(losses, train, name, label)
    for name, label in (("mean_iou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        _line(scores, evaluations, name, label, marker="o")
    _line(rates, train, "learning_rate", "learning rate")
    for axes, title in ((losses, "training loss"), (scores, "validation"), (rates, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    losses.set_ylim(bottom=0)
    scores.set_ylim(0, 1)
    losses.legend()
    scores.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def _line(axes: Axes, rows: Rows, name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if row[name] is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
