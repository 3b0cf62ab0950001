"""The page that compares several runs: scores, curves, classes, calibration, images and settings."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ocrnet.report import charts
from ocrnet.report.compute import Figures
from ocrnet.report.html import bar, document, img_element, indexed, jpeg, named, section, table
from ocrnet.report.page import curves
from ocrnet.report.source import Source, shown
from ocrnet.report.summary import ClassLine, Number, Summary, percent, summary


def distinct(runs: Sequence[Source]) -> list[str]:
    """Return a unique name for each run: the end of its folder's path, with as few parts as necessary."""
    paths = [Path(run.folder).resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def page(
    runs: Sequence[Source], figures: Sequence[Figures | None], *, note: str = "", refresh: int | None = None
) -> str:
    """Return the page that compares runs; changes are relative to the first run.

    Args:
        runs: The runs.
        figures: The figures of each run; None for a run that was not evaluated.
        note: A text about omitted parts, shown below the title.
        refresh: Seconds after which the page reloads; None disables reloading.

    Returns:
        The page as HTML.
    """
    summaries = [summary(run, some) for run, some in zip(runs, figures, strict=True)]
    names = [one.name for one in summaries]
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    text = f"<header><h1>{escape(title)}</h1><p>Comparison; changes are relative to {escape(names[0])}.</p></header>"
    text += f'<p class="note">{escape(note)}</p>' if note else ""
    parts = [text, _numbers(summaries), curves(runs), _classes(summaries), _calibration(summaries, figures)]
    parts += [_images(summaries, figures), _settings(runs)]
    return document("ocrnet report: " + " | ".join(names), "".join(parts), refresh=refresh)


def _numbers(summaries: Sequence[Summary]) -> str:
    def row(label: str, values: Sequence[Number], digits: int = 2, *, less: bool = False) -> list[str]:
        cells = [f"<td>{percent(value, digits)}{_change(value, values[0], less)}</td>" for value in values]
        return [f"<td>{label}</td>", f"<td>{percent(values[0], digits)}</td>", *cells[1:]]

    rows = [
        row("mean IoU, %", [one.mean_iou for one in summaries]),
        row("pixel accuracy, %", [one.pixel_accuracy for one in summaries]),
        row("mean accuracy, %", [one.mean_accuracy for one in summaries]),
        row("boundary F, %", [one.boundary for one in summaries]),
        row("calibration error, %", [one.calibration for one in summaries], less=True),
        ["<td>images per second</td>", *(f"<td>{_plain(one.images_per_second)}</td>" for one in summaries)],
        ["<td>steps</td>", *(f"<td>{one.step:,}</td>" for one in summaries)],
    ]
    head = ["", *(escape(one.name) for one in summaries)]
    origins = "<br>".join(
        f"{escape(one.name)}: {escape(one.network)}; {escape(one.origin or 'not evaluated')}." for one in summaries
    )
    content = f'<div class="panel">{table(head, rows)}</div><p class="soft" style="margin-top:12px">{origins}</p>'
    return section("numbers", "Scores and speed", content)


def _classes(summaries: Sequence[Summary]) -> str:
    lines = [{line.name: line for line in one.classes} for one in summaries]
    names = list(dict.fromkeys(name for some in lines for name in some))
    if not names:
        return ""

    def largest_change(name: str) -> float:
        first = _iou(lines[0].get(name))
        changes = [_iou(some.get(name)) for some in lines[1:]]
        known = [abs(value - first) for value in changes if value is not None and first is not None]
        return max(known, default=-1.0)

    rows = []
    for name in sorted(names, key=largest_change, reverse=True):
        color = next(some[name].color for some in lines if name in some)
        values = [_iou(some.get(name)) for some in lines]
        rows.append(
            [
                f'<td class="name" title="{escape(name)}">{named(name, color)}</td>',
                f"<td>{percent(values[0])}</td>",
                *(f"<td>{percent(value)}{_change(value, values[0])}</td>" for value in values[1:]),
                f'<td class="wide maybe">{_bars(values)}</td>',
            ]
        )
    head = ["IoU, %", *(escape(one.name) for one in summaries), '<span class="maybe"></span>']
    lead = "Classes with the largest change come first."
    return section("classes", "Changes by class", f'<div class="panel">{table(head, rows)}</div>', lead)


def _calibration(summaries: Sequence[Summary], figures: Sequence[Figures | None]) -> str:
    known = [(one.name, some.facts["calibration"]) for one, some in zip(summaries, figures, strict=True) if some]
    if not known:
        return ""
    legend = "".join(
        f'<span><i class="key s{number % 6 + 1}"></i>{escape(name)} <b>{percent(some["error"])} %</b></span>'
        for number, (name, some) in enumerate(known)
    )
    drawing = charts.reliability(known if len(known) > 1 else [("", known[0][1])])
    content = f'<div class="panel"><p class="legend">{legend}</p>{drawing}</div>'
    lead = "Accuracy of each confidence interval. The number after a name is the expected calibration error."
    return section("calibration", "Calibration", content, lead)


def _settings(runs: Sequence[Source]) -> str:
    def rows(tables: Sequence[dict]) -> Iterable[list[str]]:
        for key in dict.fromkeys(key for some in tables for key in some if key != "save_dir"):
            texts = [shown(some[key], key) if key in some else "–" for some in tables]
            if len(set(texts)) > 1:
                yield [f"<td>{escape(key)}</td>", *(f"<td>{escape(text)}</td>" for text in texts)]

    differences = [*rows([run.config for run in runs]), *rows([run.versions for run in runs])]
    if not differences:
        return section("setup", "Differences", '<p class="soft">Config and versions are the same in all runs.</p>')
    content = table(["", *(escape(run.name) for run in runs)], differences, "plain")
    return section("setup", "Differences", f'<div class="panel">{content}</div>', "Config and versions.")


def _bars(values: Sequence[Number]) -> str:
    return "".join(bar(value, f"s{number % 6 + 1}") for number, value in enumerate(values))


def _images(summaries: Sequence[Summary], figures: Sequence[Figures | None]) -> str:
    """Return the section of the images that are stored for all runs, with the prediction of each run."""
    known = [(one.name, some) for one, some in zip(summaries, figures, strict=True) if some]
    positions = [
        {sample["name"]: position for position, sample in enumerate(some.facts["samples"]) if sample["why"] == "same"}
        for _, some in known
    ]
    parts = []
    for image in positions[0] if len(known) > 1 else ():
        if not all(image in some for some in positions[1:]):
            continue
        first, where = known[0][1], positions[0][image]
        panels = [("image", jpeg(first.arrays[f"{where}_image"]))]
        panels.append(("ground truth", indexed(first.arrays[f"{where}_truth"], first.facts["palette"])))
        for (name, some), by_name in zip(known, positions, strict=True):
            prediction = some.arrays[f"{by_name[image]}_prediction"]
            score = some.facts["samples"][by_name[image]]["mean_iou"]
            panels.append((f"{name}: {percent(score)} %", indexed(prediction, some.facts["palette"])))
        cells = "".join(f"<div>{img_element(uri, label)}<span>{escape(label)}</span></div>" for label, uri in panels)
        parts.append(
            f'<figure class="panel sample"><figcaption><b>{escape(image)}</b></figcaption>'
            f'<div class="many">{cells}</div></figure>'
        )
    return section("images", "Same images", "".join(parts), "In percent: mean IoU of the image.") if parts else ""


def _iou(line: ClassLine | None) -> Number:
    return line.iou if line else None


def _change(value: Number, first: Number, less: bool = False) -> str:
    if value is None or first is None or abs(by := 100 * (value - first)) < 0.005:
        return ""
    text = f"{by:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f' <span class="{"up" if (by > 0) != less else "down"}">{text}</span>'


def _plain(value: Number) -> str:
    return "–" if value is None else f"{value:.3g}"
