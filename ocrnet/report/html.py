"""HTML elements shared by both pages; every text of a run must be escaped with `escape`."""

import base64
import io
import time
from collections.abc import Iterable, Sequence
from html import escape

import cv2
import numpy as np
from PIL import Image

from ocrnet.data.datasets.base import IGNORE
from ocrnet.report.style import CSS, SCRIPT
from ocrnet.report.summary import Number, percent
from ocrnet.utils.version import __version__

# Prevents the browser from fetching anything, even if a text is not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_QUALITY = 82
_WRONG = (235, 64, 52)


def document(title: str, body: str, *, refresh: int | None = None) -> str:
    """Return a complete page.

    Args:
        title: The title, escaped here.
        body: The content as HTML.
        refresh: Seconds after which the page reloads; None disables reloading.

    Returns:
        The page as HTML.
    """
    refresh_tag = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    version_and_time = f"ocrnet {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{refresh_tag}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}<footer>Written by {escape(version_and_time)}. This file is self-contained.</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def section(name: str, title: str, content: str, lead: str = "") -> str:
    """Return a section of the page.

    Args:
        name: The id of the section.
        title: The heading as HTML; it is not escaped, so it must not come from a run.
        content: The content as HTML.
        lead: An introduction as HTML; it must not come from a run.

    Returns:
        The section as HTML.
    """
    lead_html = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}"><h2>{title}</h2>{lead_html}{content}</section>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a row of large numbers; each entry consists of label, number, and a small text below the number."""
    cells = "".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(small)}</small></div>'
        for label, value, small in entries
    )
    return f'<div class="tiles">{cells}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table that scrolls horizontally if it is too wide.

    Args:
        head: The header cells as HTML; empty for none.
        rows: The cells of each row as HTML, with their td elements.
        kind: The CSS class of the table.

    Returns:
        The table as HTML.
    """
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join("<tr>" + "".join(cells) + "</tr>" for cells in rows)
    return f'<div class="scroll"><table class="{kind}">{top}{body}</table></div>'


def named(name: str, color: Sequence[int]) -> str:
    """Return a class's color as a small square, followed by its name."""
    # mutation: escape-class-names
    return f"{swatch(color)}{escape(name)}"


def swatch(color: Sequence[int]) -> str:
    """Return a small square of a color."""
    return f'<i class="swatch" style="background:rgb({",".join(str(int(part)) for part in color)})"></i>'


def bar(value: Number, kind: str = "") -> str:
    """Return a bar whose length is ``value``, limited to 0 to 1; ``kind`` is a CSS class."""
    return f'<span class="bar {kind}"><i style="width:{percent(min(max(value or 0.0, 0.0), 1.0), 1)}%"></i></span>'


def jpeg(image: np.ndarray) -> str:
    """Return an image, uint8 H,W,3 RGB, as a data URI of a JPEG."""
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert encoded, "OpenCV cannot write a JPEG"
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def indexed(indices: np.ndarray, palette: Sequence[Sequence[int]]) -> str:
    """Return class indices, uint8 H,W, as a data URI of a PNG in the class colors; 255 is dark gray."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = np.array(palette, np.uint8).reshape(-1, 3)
    colors[IGNORE] = 40
    png = Image.fromarray(indices, "P")
    png.putpalette(colors.tobytes())
    packed = io.BytesIO()
    png.save(packed, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def errors(image: np.ndarray, prediction: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
    """Return the image in pale gray, with wrongly predicted pixels in red and ignored pixels in dark gray.

    Args:
        image: uint8 H,W,3 RGB.
        prediction: Predicted class indices, uint8 H,W.
        ground_truth: Ground truth class indices, uint8 H,W; 255 is ignored.

    Returns:
        uint8 H,W,3 RGB.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    pale = np.repeat((gray // 3 + 120)[..., None], 3, axis=2)
    pale[ground_truth == IGNORE] = 40
    pale[(prediction != ground_truth) & (ground_truth != IGNORE)] = _WRONG
    return pale


def glow(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return a heat map of a region (uint8 h,w) over the dimmed image, uint8 H,W,3 RGB."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    size = image.shape[1], image.shape[0]
    weight = cv2.resize(region, size, interpolation=cv2.INTER_LINEAR)
    light = cv2.applyColorMap(weight, cv2.COLORMAP_INFERNO)[..., ::-1].astype(np.float32)
    share = weight[..., None].astype(np.float32) / 255
    return np.clip(gray * 0.35 * (1 - share) + light * (0.25 + 0.75 * share), 0, 255).astype(np.uint8)


def img_element(uri: str, description: str) -> str:
    """Return an image element with an alternative text."""
    return f'<img src="{uri}" alt="{escape(description)}">'
