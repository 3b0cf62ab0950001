"""MODEL_CARD.md of a run: the network, its training, its scores and its limitations."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ocrnet.report import files
from ocrnet.report.compute import Figures
from ocrnet.report.source import Source, shown
from ocrnet.report.summary import Number, Summary, percent, summary
from ocrnet.utils.errors import OcrnetError

_MARK = re.compile(r"<!-- ocrnet report ([0-9a-f]{16}): .*-->\n")

_SETTINGS = (
    "seed", "batch_size", "accumulate_steps", "total_step", "lr_init", "schedule", "warmup_step", "mix",
    "optimizer.weight_decay", "optimizer.decay", "loss.aux", "loss.ocr", "loss.ohem", "data.crop_size",
    "data.scale_range", "backbone.pretrained", "backbone.blocks", "backbone.modules", "ocr_head.channels",
    "ocr_head.variant",
)  # fmt: skip


def card(run: Source, figures: Figures | None) -> str:
    """Return the model card of a run as Markdown; without ``figures``, scores come from the recorded evaluations."""
    run_summary = summary(run, figures)
    facts = figures.facts if figures else {}
    started = next((str(row["time"]) for row in reversed(run.starts) if row.get("time")), "")
    rows = {
        "network": run_summary.network,
        "checkpoint": f"{facts['checkpoint']}, after {facts['step']:,} steps" if facts else "",
        "SHA-256 of its tensors": facts.get("key", {}).get("checkpoint", ""),
        "trained on": f"{run_summary.dataset}, training split"
        if run_summary.dataset and run.train
        else run_summary.dataset,
        "steps of the run": f"{run_summary.step:,}"
        + (f" of {run_summary.total_step:,}" if run_summary.total_step else ""),
        "started": started,
        "commit": next((str(row["commit"]) for row in reversed(run.starts) if row.get("commit")), ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    text = f"# {_plain(run.name)}\n\n" + _table(("", ""), [(k, _plain(v)) for k, v in rows.items() if v])
    text += "\n## Results\n\n" + _scores(run_summary)
    if settings := [(f"`{name}`", _plain(shown(run.config[name]))) for name in _SETTINGS if name in run.config]:
        text += "\n## Training\n\n" + _table(("key", "value"), settings)
    return text + (
        "\n## Use\n\n"
        "The network assigns one of the classes above to every pixel of a photo, including pixels that belong to none "
        "of them. The scores are valid for images like those of the validation split; for other images or sizes, "
        "evaluate the network first. It has not been examined for uses where an error can cause harm. The license of "
        "the dataset on which it was trained may restrict the use of the weights.\n\n"
        "```python\nimport ocrnet\n\n"
        "labels = ocrnet.load(CHECKPOINT).predict(image)  # uint8 H,W,3 RGB -> uint8 H,W\n```\n"
    )


def write(path: Path, text: str) -> Path:
    """Write a card and return its path; if the existing card was edited, keep it and add ``.new`` to the new name."""
    # mutation: keep-edited-model-card
    if path.exists() and not _is_unedited(path):
        path = path.with_name(f"{path.stem}.new{path.suffix}")
    marker = f"<!-- ocrnet report {_digest(text)}: the next report replaces this file unless it is edited -->\n"
    return files.write(path, (marker + text).encode())


def _is_unedited(path: Path) -> bool:
    """Return whether a card is as `write` wrote it, according to the digest in its first line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OcrnetError(f"'{path}' cannot be read: {error}; move it, or choose another --output") from None
    mark = _MARK.match(text)
    return mark is not None and mark[1] == _digest(text[mark.end() :])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scores(run_summary: Summary) -> str:
    if run_summary.mean_iou is None:
        return "Not evaluated.\n"
    means: dict[str, Number] = {
        "mean IoU": run_summary.mean_iou,
        "pixel accuracy": run_summary.pixel_accuracy,
        "mean accuracy": run_summary.mean_accuracy,
        "boundary F-score": run_summary.boundary,
        "expected calibration error": run_summary.calibration,
    }
    text = (
        f"On {_plain(run_summary.origin)}; in percent.\n\n"
        if run_summary.boundary is not None
        else f"Source: {_plain(run_summary.origin)}; in percent.\n\n"
    )
    text += _table(("", "%"), [(name, percent(value)) for name, value in means.items() if value is not None])
    rows = [
        (
            str(index),
            _plain(line.name),
            percent(line.iou),
            percent(line.accuracy),
            percent(line.boundary),
            percent(line.share),
        )
        for index, line in enumerate(run_summary.classes)
    ]
    return text + "\n" + _table(("index", "class", "IoU", "accuracy", "boundary F", "pixels"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _plain(text: str) -> str:
    """Return a text as one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#&!~])", r"\\\1", " ".join(str(text).split()))
