"""CamVid in its 11-class form: images/SPLIT/NAME.jpg and labels/SPLIT/NAME.png."""

from pathlib import Path

from ocrnet.datasets.base import IGNORE, ClassTable, Colour, Pair
from ocrnet.datasets.folder import scan_split

# Brostow, Fauqueur, Cipolla, Pattern Recognition Letters 2009, in the 11 classes of the SegNet split; 11 is unlabelled.
CLASSES: tuple[tuple[str, Colour], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign-symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)


def classes(root: Path) -> ClassTable:
    """Return the 11 classes; ``root`` is not looked at."""
    names, palette = zip(*CLASSES, strict=True)
    return ClassTable(names, palette, tuple(range(11)), frozenset({11, IGNORE}), void_id=11)


def scan(root: Path, split: str, *, labelled: bool) -> list[Pair]:
    """List a split; with ``labelled``, each image needs its label."""
    return scan_split(root, split, labelled=labelled)
