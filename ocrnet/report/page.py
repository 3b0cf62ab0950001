"""The report of a single run, an HTML page."""

import base64
import json
from collections.abc import Sequence
from html import escape

import numpy as np

from ocrnet import config
from ocrnet.config import Config
from ocrnet.report import charts
from ocrnet.report.charts import Series
from ocrnet.report.compute import Figures
from ocrnet.report.html import (
    bar,
    document,
    errors,
    glow,
    img_element,
    indexed,
    jpeg,
    named,
    section,
    swatch,
    table,
    tiles,
)
from ocrnet.report.source import Row, Source, shown
from ocrnet.report.summary import Number, Summary, number, percent, summary, waiting

# Maximum number of confused class pairs, and of object regions, that are listed.
MAX_PAIRS = 8
MAX_REGIONS = 12


def page(run: Source, figures: Figures | None, *, note: str = "", refresh: int | None = None) -> str:
    """Return the page of a run.

    Args:
        run: The run.
        figures: Its figures; None if the run was not evaluated.
        note: A text about omitted parts, shown below the numbers.
        refresh: Seconds after which the page reloads; None disables reloading.

    Returns:
        The page as HTML.
    """
    run_summary = summary(run, figures)
    parts = [_head(run_summary, note, live=refresh is not None), curves([run])]
    if run_summary.classes:
        parts.append(_classes(run_summary))
    if figures:
        parts += [_confusion(figures), _calibration(figures), _samples(figures), _ocr_section(figures)]
    parts += [_scored(run), _setup(run, figures)]
    return document(f"{run.name}: ocrnet report", "".join(parts), refresh=refresh)


def _head(run_summary: Summary, note: str, *, live: bool) -> str:
    about = [run_summary.network, *([f"on {run_summary.dataset}"] if run_summary.dataset else [])]
    done = f"{run_summary.step:,}" + (f" of {run_summary.total_step:,}" if run_summary.total_step else "") + " steps"
    running = f'<p><span class="live">● live</span> after {escape(done)}</p>' if live else ""
    text = f"<header><h1>{escape(run_summary.name)}</h1><p>{escape(', '.join([*about, done]))}</p>{running}</header>"
    entries = [
        ("mean IoU", percent(run_summary.mean_iou), "%, mean over the classes"),
        ("pixel accuracy", percent(run_summary.pixel_accuracy), "% of labeled pixels"),
    ]
    if run_summary.boundary is not None:
        entries.append(("boundary F", percent(run_summary.boundary), "%, mean over the classes"))
    if run_summary.calibration is not None:
        entries.append(("calibration error", percent(run_summary.calibration), "%, expected"))
    if run_summary.images_per_second is not None:
        entries.append(("training speed", f"{run_summary.images_per_second:.3g}", "images per second"))
    if run_summary.memory_bytes is not None:
        entries.append(("memory", f"{run_summary.memory_bytes / 2**30:.2f}", "GiB, peak"))
    scored = run_summary.mean_iou is not None
    text += tiles(entries if scored else entries[2:])
    origin = f"Scores: {run_summary.origin}." if scored else "Not evaluated yet."
    text += f'<p class="soft" style="margin-top:12px">{escape(origin)}</p>'
    return text + (f'<p class="note">{escape(note)}</p>' if note else "")


def curves(runs: Sequence[Source]) -> str:
    """Return the section of charts: for one run with the loss of each head, for several with one curve per run."""
    single = len(runs) == 1

    def over(name: str, label: str, *, evals: bool = False, factor: float = 1.0) -> list[Series]:
        return [
            Series(label if single else run.name, _steps(rows), _values(rows, name, factor), dots=evals)
            for run in runs
            for rows in [run.evals if evals else run.train]
        ]

    losses = over("loss", "total")
    if single:
        losses += over("loss_ocr", "OCR") + over("loss_aux", "auxiliary")
    scores = over("mean_iou", "mIoU", evals=True, factor=100)
    if single:
        scores += over("pixel_accuracy", "pixel accuracy", evals=True, factor=100)
    waits = [
        Series(
            "data wait" if single else run.name, _steps(run.train), [_times(part, 100) for part in waiting(run.train)]
        )
        for run in runs
    ]

    charts_html = [
        charts.line("training loss", losses, low=0),
        charts.line("validation", scores, unit=" %"),
        charts.line("learning rate", over("learning_rate", "learning rate"), low=0),
        charts.line("images per second", over("images_per_second", "img/s"), low=0),
        charts.line("memory, GiB", over("memory_bytes", "memory", factor=2**-30), low=0),
        charts.line("waiting for data", waits, low=0, high=5, unit=" %"),
    ]
    lead = "Values over the training steps. The number after a name is the newest value, or that at the pointer's step."
    return section("curves", "Curves", f'<div class="charts">{"".join(charts_html)}</div>', lead)


def _classes(run_summary: Summary) -> str:
    edges = any(line.boundary is not None for line in run_summary.classes)
    head = ["class", "IoU, %", "", "accuracy, %", *(["boundary F, %"] if edges else []), "pixels, %"]
    order = sorted(run_summary.classes, key=lambda line: (line.iou is None, -(line.iou or 0)))
    rows = [
        [
            f'<td class="name" title="{escape(line.name)}">{named(line.name, line.color)}</td>',
            f"<td><b>{percent(line.iou)}</b></td>",
            f'<td class="wide">{bar(line.iou)}</td>',
            f"<td>{percent(line.accuracy)}</td>",
            *([f"<td>{percent(line.boundary)}</td>"] if edges else []),
            f"<td>{percent(line.share)}</td>",
        ]
        for line in order
    ]
    lead = (
        "Accuracy is the share of a class’s pixels that are predicted correctly. A dash means that no pixel determines "
        "the value."
    )
    if edges:
        lead += (
            " Boundary F combines precision and recall of the class’s boundary pixels, with a tolerance of 0.75 % of "
            "the image’s diagonal (Csurka et al., 2013)."
        )
    return section("classes", "Classes", f'<div class="panel">{table(head, rows)}</div>', lead)


def _confusion(figures: Figures) -> str:
    counts, names = figures.facts["confusion"], figures.facts["names"]
    pairs = []
    for row, pixels in enumerate(counts):
        for column, num_pixels in enumerate(pixels):
            if row != column and num_pixels:
                pairs.append((num_pixels, num_pixels / sum(pixels), names[row], names[column]))
    wrong = sum(pair[0] for pair in pairs) or 1
    rows = "".join(
        f"<li><span>{escape(ground_truth)} predicted as {escape(prediction)} "
        f'<span class="soft">({percent(share, 1)} % of the class)</span></span>'
        f"<b>{percent(num_pixels / wrong, 1)} %</b></li>"
        for num_pixels, share, ground_truth, prediction in sorted(pairs, reverse=True)[:MAX_PAIRS]
    )
    content = (
        f'<div class="two"><div class="panel">{charts.heat(counts, names)}</div><div class="panel">'
        f'<h3 style="margin-top:0">Largest shares of the wrong pixels</h3><ol class="pairs">{rows}</ol></div></div>'
    )
    lead = (
        "Rows are the ground truth, columns the prediction; numbers are percent of the row’s pixels. The color is "
        "proportional to the square root of the number."
    )
    return section("confusion", "Confusion", content, lead)


def _calibration(figures: Figures) -> str:
    calibration = figures.facts["calibration"]
    total = sum(calibration["pixels"]) or 1
    mean_confidence = (
        sum((c or 0) * n for c, n in zip(calibration["confidence"], calibration["pixels"], strict=True)) / total
    )
    mean_accuracy = (
        sum((a or 0) * n for a, n in zip(calibration["accuracy"], calibration["pixels"], strict=True)) / total
    )
    tendency = "overconfident" if mean_confidence > mean_accuracy else "underconfident"
    tendency = "neither overconfident nor underconfident" if abs(mean_confidence - mean_accuracy) < 0.005 else tendency
    text = (
        f"<p>The expected calibration error is <b>{percent(calibration['error'])} %</b>: the mean gap between "
        f"confidence and accuracy over {total:,} pixels.</p>"
        f"<p>Its mean confidence is {percent(mean_confidence)} %, and {percent(mean_accuracy)} % of the pixels are "
        f"correct: on average, the network is {tendency}.</p>"
        '<p class="soft">Each bar is one of 15 confidence intervals (Guo et al., 2017). Blue plus green is its '
        "accuracy. Red is confidence above the accuracy (overconfident), green is accuracy above the confidence "
        "(underconfident). Gray, below: the number of pixels.</p>"
    )
    diagram = charts.reliability([("", calibration)])
    content = f'<div class="two narrow"><div class="panel">{diagram}</div><div>{text}</div></div>'
    return section("calibration", "Calibration", content)


def _samples(figures: Figures) -> str:
    facts, parts = figures.facts, []
    for position, sample in enumerate(facts["samples"]):
        if sample["why"] == "same":
            continue
        image, prediction = figures.arrays[f"{position}_image"], figures.arrays[f"{position}_prediction"]
        ground_truth = figures.arrays[f"{position}_truth"]
        panels = (
            ("image", jpeg(image)),
            ("ground truth", indexed(ground_truth, facts["palette"])),
            ("prediction", indexed(prediction, facts["palette"])),
            ("errors", jpeg(errors(image, prediction, ground_truth))),
        )
        cells = "".join(f"<div>{img_element(uri, label)}<span>{label}</span></div>" for label, uri in panels)
        scores = f"mIoU {percent(sample['mean_iou'])} %, pixels {percent(sample['pixel_accuracy'])} %"
        parts.append(
            f'<figure class="panel sample"><figcaption><b>{escape(sample["why"])}: {escape(sample["name"])}</b>'
            f'<span>{scores}</span></figcaption><div class="four">{cells}</div></figure>'
        )
    shown_indices = np.unique(
        np.concatenate([array.ravel() for name, array in figures.arrays.items() if _is_labels(name)])
    )
    legend = "".join(
        f"<span>{named(name, color)}</span>"
        for index, (name, color) in enumerate(zip(facts["names"], facts["palette"], strict=True))
        if index in shown_indices
    )
    ignored = f"<span>{swatch((40, 40, 40))}ignored</span>"
    lead = "Ranked by the mean IoU of the image. In “errors”, wrong pixels are red."
    return section(
        "images", "Best and worst images", f'{"".join(parts)}<div class="classes">{legend}{ignored}</div>', lead
    )


def _is_labels(name: str) -> bool:
    return name.endswith(("_truth", "_prediction"))


def _ocr_section(figures: Figures) -> str:
    facts, arrays = figures.facts, figures.arrays
    if not facts["ocr"]:
        return ""
    names, palette, relation = facts["names"], facts["palette"], arrays["ocr_relation"]
    count, height, width = relation.shape
    second = np.sort(relation, axis=0)[-2] if count > 1 else relation[0]
    y, x = (int(value) for value in np.unravel_index(int(second.argmax()), second.shape))
    shares = relation[:, y, x] / 255
    rows = "".join(
        f"<span>{named(name, color)}</span>{bar(float(share))}<b>{percent(float(share), 1)}</b>"
        for name, color, share in zip(names, palette, shares, strict=True)
    )
    data = {
        "width": width,
        "height": height,
        "x": x,
        "y": y,
        "bytes": base64.b64encode(relation.tobytes()).decode(),
    }
    image, labels = arrays["ocr_image"], arrays["ocr_labels"]
    pin = f'<i class="pin" style="left:{100 * (x + 0.5) / width:.2f}%;top:{100 * (y + 0.5) / height:.2f}%"></i>'
    stage = (
        f'<div class="stage" tabindex="0" role="application" aria-label="Image. Arrow keys move the selected pixel.">'
        f"{img_element(jpeg(image), 'the image')}{pin}</div>"
    )
    top = (
        f'<div class="two"><figure class="panel sample" style="margin:0"><figcaption><b>{escape(facts["ocr"]["name"])}'
        f"</b><span>point to a pixel, or tap it</span></figcaption>{stage}</figure>"
        f'<div class="panel"><h3 style="margin-top:0">Relation of this pixel to each region, %</h3>'
        f'<div class="relation">{rows}</div></div></div>'
    )
    areas = np.bincount(labels.ravel(), minlength=count)[:count]
    order = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]][:MAX_REGIONS]
    small = _smaller(image)
    regions = "".join(
        f'<figure class="region">{img_element(jpeg(glow(small, arrays["ocr_regions"][index])), "soft region")}'
        f"<figcaption>{named(names[index], palette[index])}<small>{percent(facts['ocr']['own'][index], 0)} % on "
        "pixels predicted as this class</small></figcaption></figure>"
        for index in order
    )
    script = f'<script type="application/json" id="relation">{json.dumps(data)}</script>'
    lead = (
        "Object-contextual representations: the network first computes a soft region for each class (shown below as a "
        "heat map), then weights the regions for each pixel by its relation to them. Training does not force a pixel "
        "to prefer the region of its own class."
    )
    heading = "<h3>Soft object regions</h3>"
    return section("ocr", "Object regions (OCR)", f'{top}{heading}<div class="regions">{regions}</div>{script}', lead)


def _smaller(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[::2, ::2])


def _scored(run: Source) -> str:
    rows = [
        [
            f"<td>{escape(str(row.get('checkpoint', '')).rsplit('/', 1)[-1])}</td>",
            f"<td>{escape(shown(row.get('scales', '')))}{', flip' if row.get('flip') is True else ''}</td>",
            *(f"<td>{percent(number(row.get(name)))}</td>" for name in ("mean_iou", "pixel_accuracy")),
        ]
        for row in run.scored
    ]
    if not rows:
        return ""
    content = table(["checkpoint", "scales", "mIoU, %", "pixel accuracy, %"], rows)
    return section(
        "evaluations", "Evaluations", f'<div class="panel">{content}</div>', "From ocrnet eval, oldest first."
    )


def _setup(run: Source, figures: Figures | None) -> str:
    normal = dict(config.flat(config.as_dict(Config())))
    values = [
        [f"<td>{escape(name)}</td><td>{escape(shown(value, name))}</td>"]
        for name, value in run.config.items()
        if name in normal and value != normal[name]
    ]
    every = [[f"<td>{escape(name)}</td><td>{escape(shown(value, name))}</td>"] for name, value in run.config.items()]
    parts = []
    if values:
        parts.append(
            _details(f"Config: {len(values)} keys that differ from the defaults", table((), values, "plain"), True)
        )
    if every:
        parts.append(_details(f"Config, all {len(every)} keys", table((), every, "plain")))
    if versions := run.versions or (figures.facts["versions"] if figures else {}):
        rows = [[f"<td>{escape(str(k))}</td><td>{escape(str(v))}</td>"] for k, v in versions.items()]
        parts.append(_details("Versions", table((), rows, "plain")))
    if run.starts:
        rows = [[f"<td>{escape(str(row.get('time', '')))}</td><td>{_start(row)}</td>"] for row in run.starts]
        parts.append(_details(f"Starts: {len(rows)}", table((), rows, "plain")))
    return section("setup", "Config, versions and starts", "".join(parts)) if parts else ""


def _start(row: Row) -> str:
    command = row.get("command")
    words = " ".join(shown(word) for word in command) if isinstance(command, list) else ""
    commit = f"<br>commit {escape(str(row['commit']))}" if row.get("commit") else ""
    return f"<code>{escape(words)}</code>{commit}"


def _details(title: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def _steps(rows: Sequence[Row]) -> list[float]:
    return [row["step"] for row in rows]


def _values(rows: Sequence[Row], name: str, factor: float) -> list[Number]:
    return [_times(number(row.get(name)), factor) for row in rows]


def _times(value: Number, factor: float) -> Number:
    return None if value is None else value * factor
