"""Custom datasets, which need no code: folders images/ and labels/, and a classes.yml with the class names."""

from pathlib import Path
from typing import Any

from ocrnet.config.loader import load_yaml
from ocrnet.data.datasets.base import IGNORE, ClassTable, Pair, colors
from ocrnet.data.datasets.files import listing, scan_trees
from ocrnet.utils.errors import OcrnetError, nearest

CLASSES_YML = """classes.yml is a list of names, whose positions are the ids in the label files: [road, car, sky]
or, to set ids, colors or ignored ids:
  classes:
    - {name: road, id: 7, color: [128, 64, 128]}   # id and color are optional
    - {name: car, id: 26}
  ignore: [0, 1]   # 255 is always ignored"""

LAYOUT = """the layout of a folder dataset is
  DATASET_DIR/classes.yml
  DATASET_DIR/images/SPLIT/.../NAME.png (or .jpg .jpeg .bmp .tif .tiff .webp)
  DATASET_DIR/labels/SPLIT/.../NAME.png   one channel, values are class ids"""


def classes(root: Path) -> ClassTable:
    """Return the classes in ROOT/classes.yml; raise `OcrnetError`, which names the invalid entry."""
    path = root / "classes.yml"
    if not path.is_file():
        raise OcrnetError(f"{path} does not exist; {root} holds {listing(root)}\n{LAYOUT}\n{CLASSES_YML}")
    tree = load_yaml(path, kinds=(dict, list))
    tree = {"classes": tree} if isinstance(tree, list) else tree
    _known_keys(path, "the file", tree, ("classes", "ignore"))
    entries = tree.get("classes")
    if not isinstance(entries, list) or not entries:
        raise _classes_error(path, f"classes is {entries!r}, not a list of at least one class")
    if len(entries) > IGNORE:
        raise _classes_error(path, f"{len(entries)} classes; at most {IGNORE} are allowed")
    names, ids, colors_given = zip(*(_entry(path, i, entry) for i, entry in enumerate(entries)), strict=True)
    ignored = _ignored(path, tree.get("ignore", []))
    for field, values in (("name", names), ("id", ids)):
        _check_unique(path, field, values)
    for i, value in enumerate(ids):
        if value in ignored:
            raise _classes_error(path, f"class {i} ({names[i]}) has the id {value}, which is ignored")
    free = (color for color in colors() if color not in colors_given)
    palette = tuple(color or next(free) for color in colors_given)
    return ClassTable(names=names, palette=palette, ids=ids, ignored=ignored)


def scan(root: Path, split: str, *, labels: bool = True) -> list[Pair]:
    """Return the pairs of a split, sorted by path.

    Args:
        root: Folder of the dataset.
        split: Name of the split.
        labels: Require a label for each image; False: label files are not accessed.

    Raises:
        OcrnetError: The folder does not have the layout, or an image has no label or the reverse.
    """
    return scan_trees(root, split, layout=LAYOUT, labels=labels)


def _entry(path: Path, i: int, entry: Any) -> tuple[str, int, tuple[int, ...] | None]:
    """Return name, id and color (None if not given) of the i-th class."""
    entry = entry if isinstance(entry, dict) else {"name": entry}
    _known_keys(path, f"class {i}", entry, ("name", "id", "color"))
    name, value, color = entry.get("name"), entry.get("id", i), entry.get("color")
    if not isinstance(name, str) or not name.strip():
        raise _classes_error(
            path, f"class {i} has the name {name!r}, which is not text (quote yes, no, on, off and numbers)"
        )
    if not _is_byte(value) or value == IGNORE:
        raise _classes_error(
            path, f"class {i} ({name}) has the id {value!r}, not a whole number from 0 to {IGNORE - 1}"
        )
    if color is None:
        return name, value, None
    if not isinstance(color, list) or len(color) != 3 or not all(map(_is_byte, color)):
        raise _classes_error(path, f"class {i} ({name}) has the color {color!r}, not [red, green, blue] from 0 to 255")
    return name, value, tuple(color)


def _ignored(path: Path, ids: Any) -> frozenset[int]:
    if not isinstance(ids, list) or not all(map(_is_byte, ids)):
        raise _classes_error(path, f"ignore is {ids!r}, not a list of ids from 0 to 255")
    return frozenset({*ids, IGNORE})


def _check_unique(path: Path, field: str, values: tuple) -> None:
    first: dict[Any, int] = {}
    for i, value in enumerate(values):
        if value in first:
            raise _classes_error(path, f"classes {first[value]} and {i} have the same {field}, {value}")
        first[value] = i


def _known_keys(path: Path, where: str, tree: dict, known: tuple[str, ...]) -> None:
    for key in tree:
        if key not in known:
            raise _classes_error(
                path, f"{where} has the unknown key {key!r}{nearest(str(key), known)} ({', '.join(known)})"
            )


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _classes_error(path: Path, problem: str) -> OcrnetError:
    return OcrnetError(f"{path}: {problem}\n{CLASSES_YML}")
