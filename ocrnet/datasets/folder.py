"""Own data without code: images/SPLIT, labels/SPLIT with the same names, and classes.yml."""

import colorsys
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet import layers
from ocrnet.datasets.base import IGNORE, ClassTable, Colour, Pair, pair_up
from ocrnet.errors import OcrnetError, nearest

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MOST = 254  # class indices 0..253; 255 is ignored, 254 marks an unknown id while reading


def classes(root: Path) -> ClassTable:
    """Read classes.yml: a list of names, or ``classes: [{name, id, color}]`` and ``ignore: [ids]``."""
    path = root / "classes.yml"
    tree = layers.load_yaml(path, like=".yml", kinds=(dict, list))
    if isinstance(tree, list):
        tree = {"classes": tree}
    _known(path, "the file", tree, ("classes", "ignore"))
    rows = tree.get("classes")
    if not isinstance(rows, list) or not 2 <= len(rows) <= MOST:
        raise OcrnetError(f"{path}: needs a list of 2 to {MOST} classes, like [road, sky]")
    found = [_entry(path, index, row) for index, row in enumerate(rows)]
    names, ids, palette = zip(*found, strict=True)
    ignored = tree.get("ignore", [])
    if not isinstance(ignored, list) or not all(_is_byte(number) for number in ignored):
        raise OcrnetError(f"{path}: ignore is {ignored!r}, but must be a list of ids from 0 to 255")
    for what, values in (("name", names), ("id", ids)):
        doubled = {value for value in values if values.count(value) > 1}
        if doubled:
            raise OcrnetError(f"{path}: {what} {sorted(doubled)[0]!r} is given to two classes")
    both = sorted({*ignored, IGNORE} & set(ids))
    if both:
        raise OcrnetError(f"{path}: id {both[0]} is a class and ignored; 255 is always ignored")
    return ClassTable(names, palette, ids, frozenset({*ignored, IGNORE}))


def scan(root: Path, split: str, *, labelled: bool) -> list[Pair]:
    """List a split; with ``labelled``, each image needs its label."""
    return scan_split(root, split, labelled=labelled)


def scan_split(root: Path, split: str, *, labelled: bool) -> list[Pair]:
    """Match images/SPLIT and labels/SPLIT by their path without its ending."""
    image_dir, label_dir = root / "images" / split, root / "labels" / split
    for folder in (image_dir, label_dir) if labelled else (image_dir,):
        if not folder.is_dir():
            raise OcrnetError(f"'{folder}' does not exist; '{root}' must hold images/{split}/ and labels/{split}/")
    labels = _by_stem(label_dir, (".png",)) if labelled else {}
    return pair_up(_by_stem(image_dir, ENDINGS), labels, where=(image_dir, label_dir), labelled=labelled)


def _by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise OcrnetError(f"'{found[stem]}' and '{path}' have the same name; rename or remove one")
            found[stem] = path
    return found


def _entry(path: Path, index: int, row: Any) -> tuple[str, int, Colour]:
    row = {"name": row} if isinstance(row, str) else row
    where = f"class {index}"
    if not isinstance(row, dict):
        raise OcrnetError(f"{path}: {where} is {row!r}, but must be a name or {{name, id, color}}")
    _known(path, where, row, ("name", "id", "color"))
    name, number, colour = row.get("name"), row.get("id", index), row.get("color", _colour(index))
    if not isinstance(name, str) or not name:
        raise OcrnetError(f"{path}: {where} has name {name!r}, but needs text (quote yes, no, on, off)")
    if not _is_byte(number):
        raise OcrnetError(f"{path}: {where} ({name}) has id {number!r}, but must be from 0 to 254")
    if not isinstance(colour, (list, tuple)) or len(colour) != 3 or not all(_is_byte(part) for part in colour):
        raise OcrnetError(f"{path}: {where} ({name}) has color {colour!r}, but must be [r, g, b] from 0 to 255")
    return name, number, (colour[0], colour[1], colour[2])


def _known(path: Path, where: str, row: dict, names: tuple[str, ...]) -> None:
    for name in row:
        if name not in names:
            raise OcrnetError(f"{path}: {where} has unknown key '{name}'{nearest(str(name), names)}")


def _is_byte(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= 255


def _colour(index: int) -> Colour:
    """Return a colour of its own for every index: hues by the golden angle, in three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, (0.95, 0.7, 0.5)[index // 12 % 3])
    return tuple(np.round(np.array([red, green, blue]) * 255).astype(int).tolist())  # type: ignore[return-value]
