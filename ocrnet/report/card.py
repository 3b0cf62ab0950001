"""MODEL_CARD.md of a run: the network, its training, its scores and the limits of its use."""

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
    """Return the model card as Markdown."""
    found = summary(run, figures)
    facts = figures.facts if figures else {}
    made = next((str(row["time"]) for row in reversed(run.starts) if row.get("time")), "")
    rows = {
        "network": found.network,
        "checkpoint": f"{facts['checkpoint']}, after {facts['step']:,} steps" if facts else "",
        "SHA-256 of its tensors": facts.get("key", {}).get("checkpoint", ""),
        "trained on": f"{found.dataset}, training split" if found.dataset and run.train else found.dataset,
        "steps of the run": f"{found.step:,}" + (f" of {found.total_step:,}" if found.total_step else ""),
        "started": made,
        "commit": next((str(row["commit"]) for row in reversed(run.starts) if row.get("commit")), ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    text = f"# {_plain(run.name)}\n\n" + _table(("", ""), [(k, _plain(v)) for k, v in rows.items() if v])
    text += "\n## Results\n\n" + _scores(found)
    if settings := [(f"`{name}`", _plain(shown(run.config[name]))) for name in _SETTINGS if name in run.config]:
        text += "\n## Training\n\n" + _table(("key", "value"), settings)
    return text + (
        "\n## Use\n\n"
        "The network assigns one of the classes above to every pixel of a photo, including pixels that belong to none "
        "of them. The scores hold for images like those of the validation split; for other images or sizes, evaluate "
        "first. The network was not examined for uses where an error can cause harm. Weights inherit the limits of "
        "the dataset that they were trained on: read its license.\n\n"
        "```python\nimport ocrnet\n\n"
        "labels = ocrnet.load(CHECKPOINT).predict(image)  # uint8 H,W,3 RGB -> uint8 H,W\n```\n"
    )


def write(path: Path, text: str) -> Path:
    """Write a card and return its path; an edited card is kept, and the new one gets ``.new`` before its suffix."""
    # mutation: keep-edited-model-card
    if path.exists() and not _is_ours(path):
        path = path.with_name(f"{path.stem}.new{path.suffix}")
    made = f"<!-- ocrnet report {_digest(text)}: replaced by the next report, unless it is edited -->\n"
    return files.write(path, (made + text).encode())


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OcrnetError(f"'{path}' cannot be read: {error}; move it, or give another --output") from None
    mark = _MARK.match(text)
    return mark is not None and mark[1] == _digest(text[mark.end() :])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scores(found: Summary) -> str:
    if found.mean_iou is None:
        return "Not evaluated.\n"
    means: dict[str, Number] = {
        "mean IoU": found.mean_iou,
        "pixel accuracy": found.pixel_accuracy,
        "mean accuracy": found.mean_accuracy,
        "boundary F-score": found.boundary,
        "expected calibration error": found.calibration,
    }
    text = (
        f"On {_plain(found.origin)}; in percent.\n\n"
        if found.boundary is not None
        else f"Source: {_plain(found.origin)}; in percent.\n\n"
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
        for index, line in enumerate(found.classes)
    ]
    return text + "\n" + _table(("index", "class", "IoU", "accuracy", "boundary F", "pixels"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _plain(text: str) -> str:
    """Return a text on one line, with Markdown and HTML characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|#&!~])", r"\\\1", " ".join(str(text).split()))
