"""Charts as SVG text; the CSS of the page sets their colors, in light and dark mode."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# A curve with more than twice this many points is split into this many parts, each drawn by its minimum and maximum.
PARTS = 240

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24

Number = float | None


@dataclass(frozen=True)
class Series:
    """One curve; a y that is None or not finite makes a gap. ``dots``: mark each point and show its value."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    dots: bool = False


def line(
    title: str,
    series: Sequence[Series],
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
) -> str:
    """Return a figure with the curves over the steps.

    Args:
        title: The title, escaped here.
        series: The curves.
        low: The y axis starts at this value or below.
        high: The y axis ends at this value or above.
        unit: Text appended to each y value.

    Returns:
        The figure as HTML with inline SVG.
    """

    def text(value: float) -> str:
        return f"{value:.4g}{unit}"

    points = [[(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None and _is_finite(y)] for one in series]
    values = [y for some in points for _, y in some]
    if not values:
        return _figure(title, "", '<p class="none">no data yet</p>')
    bottom, top = min([*values, *_as_list(low)]), max([*values, *_as_list(high)])
    ticks = nice(bottom, top)
    bottom, top = min(bottom, ticks[0]), max(top, ticks[-1])
    steps = [x for some in points for x, _ in some]
    first, last = min(steps), max(steps)
    across = nice(first, last, max_intervals=4) if last > first else [first]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - first) / (last - first) if last > first else 0.5
        return (
            _LEFT + right * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (top - y) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for tick in ticks:
        y = place(first, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text(tick))}</text>')
    for tick in across:
        if first <= tick <= last:
            x = place(tick, bottom)[0]
            anchor = "end" if x > _WIDTH - 30 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{short(tick)}</text>')
    for number, one in enumerate(series):
        parts.append(_curve(one, number, place, text))
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over the steps" '
        f"data-ends='{json.dumps([first, last, _LEFT, _WIDTH - _RIGHT, unit])}' data-points='{_numbers(points)}'>"
        f'{"".join(parts)}<line class="at" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></svg>'
    )
    return _figure(title, _legend(series, points, text), drawing)


def _curve(one: Series, number: int, place: Callable, text: Callable[[float], str]) -> str:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.x, one.y, strict=True):
        if y is not None and _is_finite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    color = f"s{number % 6 + 1}"
    drawn = []
    for run in filter(None, runs):
        points_xy = [place(x, y) for x, y in thinned(run)]
        if len(points_xy) == 1 and not one.dots:
            drawn.append(f'<circle class="dot {color}" cx="{points_xy[0][0]:.1f}" cy="{points_xy[0][1]:.1f}" r="2"/>')
        else:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points_xy)
            drawn.append(f'<path class="curve {color}" d="M{path}"/>')
    if one.dots:
        for x, y in (point for run in runs for point in thinned(run)):
            across, down = place(x, y)
            drawn.append(
                f'<circle class="dot {color}" cx="{across:.1f}" cy="{down:.1f}" r="3">'
                f"<title>{escape(one.name)}, step {x:,.0f}: {escape(text(y))}</title></circle>"
            )
    return "".join(drawn)


def _legend(series: Sequence[Series], points: Sequence[Sequence[tuple[float, float]]], text: Callable) -> str:
    entries = [
        f'<span><i class="key s{number % 6 + 1}"></i>{escape(one.name)} <b>{escape(text(some[-1][1]))}</b></span>'
        for number, (one, some) in enumerate(zip(series, points, strict=True))
        if some
    ]
    return f'<span class="legend">{"".join(entries)}</span>'


def _numbers(points: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Return, as JSON, the drawn points of each non-empty curve; the script shows the values at the pointer's step."""
    return json.dumps([[[x, float(f"{y:.5g}")] for x, y in thinned(some)] for some in points if some])


def _figure(title: str, legend: str, drawing: str) -> str:
    return f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>{drawing}</figure>'


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return the points of a curve; of a long one, both ends and the minimum and maximum of each part."""
    if len(points) <= 2 * PARTS:
        return points
    kept = {0, len(points) - 1}
    for part in range(PARTS):
        inside = range(part * len(points) // PARTS, (part + 1) * len(points) // PARTS)
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def nice(low: float, high: float, max_intervals: int = 5) -> list[float]:
    """Return axis ticks that span ``low`` to ``high``.

    Args:
        low: The smallest value.
        high: The largest value; if it is not above ``low``, a range around ``low`` is used.
        max_intervals: The approximate number of intervals.

    Returns:
        Multiples of 1, 2 or 5 times a power of ten, in ascending order.
    """
    if not high > low:
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max_intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def short(number: float) -> str:
    """Return a count in short form for an axis: 800, 20k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def heat(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return the confusion matrix as SVG; rows are ground truth classes, cells are percent of the row's pixels."""
    count = len(names)
    cell, left, top = (34, 110, 96) if count <= 12 else (27, 110, 96)
    width, height = left + count * cell + 58, top + count * cell + 4
    parts = [f'<rect class="cell" x="{left}" y="{top}" width="{count * cell - 2}" height="{count * cell - 2}" rx="3"/>']
    for row, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        middle = top + row * cell + cell / 2
        parts.append(f'<text x="{left - 8}" y="{middle + 4:.0f}" text-anchor="end">{_label(name)}</text>')
        parts.append(
            f'<text transform="translate({left + row * cell + cell / 2 + 4:.0f} {top - 8}) rotate(-55)">'
            f"{_label(name)}</text>"
        )
        total = sum(counts)
        for column, pixels in enumerate(counts):
            share = pixels / total if total else 0.0
            if share < 1e-4:
                continue
            where = f'x="{left + column * cell}" y="{top + row * cell}" width="{cell - 2}" height="{cell - 2}" rx="3"'
            kind = "right" if row == column else "wrong"
            tooltip = f"{escape(name)} predicted as {escape(names[column])}: {100 * share:.2f} % ({pixels:,} pixels)"
            # The square root makes rare confusions visible: 1 % gets a tenth of the opacity.
            parts.append(
                f'<rect class="{kind}" fill-opacity="{math.sqrt(share):.3f}" {where}><title>{tooltip}</title></rect>'
            )
            if share >= 0.005:
                ink = "on" if share > 0.3 else "off"
                x, y = left + column * cell + cell / 2 - 1, middle + 3
                parts.append(f'<text class="{ink}" x="{x:.0f}" y="{y:.0f}">{100 * share:.0f}</text>')
    return (
        f'<div class="scroll"><svg class="heat" style="min-width:{width}px;max-width:{round(1.4 * width)}px" '
        f'viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="confusion matrix: rows are the ground truth, columns the prediction">{"".join(parts)}</svg></div>'
    )


def reliability(series: Sequence[tuple[str, dict]]) -> str:
    """Return the reliability diagram as SVG: the accuracy of each confidence interval.

    ``series`` holds pairs of a name and a calibration. A single one is drawn as bars, with the gap to the mean
    confidence and the number of pixels of each interval; several are drawn as curves.
    """
    side, left, top, floor = 260, 40, 8, 54 if len(series) == 1 else 2
    width, height = left + side + 10, top + side + floor + 30

    def x(value: float) -> float:
        return left + value * side

    def y(value: float) -> float:
        return top + (1 - value) * side

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 16}" text-anchor="middle">{100 * tick:.0f}</text>')
    for number, (_, calibration) in enumerate(series):
        parts.append(_bins(calibration, number, single=len(series) == 1, x=x, y=y))
    parts.append(f'<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    if len(series) == 1:
        parts.append(_amounts(series[0][1]["pixels"], x, top + side + 4, floor - 4))
    parts.append(f'<text x="{x(0.5)}" y="{height - 3}" text-anchor="middle">confidence, %</text>')
    return (
        f'<svg class="square" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="reliability diagram: accuracy over confidence">{"".join(parts)}</svg>'
    )


def _bins(calibration: dict, number: int, *, single: bool, x: Callable, y: Callable) -> str:
    accuracy, confidence, pixels = (calibration[name] for name in ("accuracy", "confidence", "pixels"))
    count, drawn, points_xy = len(pixels), [], []
    for i, (mean_accuracy, mean_confidence, num_pixels) in enumerate(zip(accuracy, confidence, pixels, strict=True)):
        if mean_accuracy is None:
            continue
        points_xy.append(f"{x(mean_confidence):.1f} {y(mean_accuracy):.1f}")
        if single:
            at = f'x="{x(i / count) + 1:.1f}" width="{x(1 / count) - x(0) - 2:.1f}"'
            gap, kind = (
                sorted((y(mean_accuracy), y(mean_confidence))),
                "over" if mean_confidence > mean_accuracy else "under",
            )
            drawn.append(
                f'<rect class="right" {at} y="{gap[1]:.1f}" height="{y(0) - gap[1]:.1f}"/>'
                f'<rect class="{kind}" {at} y="{gap[0]:.1f}" height="{gap[1] - gap[0]:.1f}">'
                f"<title>confidence {100 * mean_confidence:.1f} %, accuracy {100 * mean_accuracy:.1f} %, "
                f"{num_pixels:,} pixels</title></rect>"
            )
    if not single and points_xy:
        drawn.append(f'<path class="curve s{number % 6 + 1}" d="M{"L".join(points_xy)}"/>')
    return "".join(drawn)


def _amounts(pixels: Sequence[int], x: Callable, top: float, height: float) -> str:
    largest, count = max(max(pixels), 1), len(pixels)
    return "".join(
        f'<rect class="amount" x="{x(i / count) + 1:.1f}" width="{x(1 / count) - x(0) - 2:.1f}" '
        f'y="{top:.1f}" height="{num_pixels / largest * (height - 8):.1f}"/>'
        for i, num_pixels in enumerate(pixels)
    )


def _label(name: str) -> str:
    return escape(name if len(name) <= 16 else name[:15] + "…")


def _is_finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_list(value: float | None) -> list[float]:
    return [] if value is None else [value]
