"""CamVid (Brostow et al., Pattern Recognition Letters 2009) with the 11 classes and the split of SegNet, 480x360."""

from pathlib import Path

from ocrnet.data.datasets.base import ClassTable, Pair
from ocrnet.data.datasets.files import scan_trees

LAYOUT = """the layout of CamVid is
  DATASET_DIR/images/SPLIT/NAME.jpg (or .png)
  DATASET_DIR/labels/SPLIT/NAME.png   ids 0 to 10, 11 is unlabeled"""

UNLABELED = 11

CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign-symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


def classes(root: Path) -> ClassTable:
    """Return the 11 classes; id 11 (unlabeled) is ignored."""
    return ClassTable(
        names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        ids=tuple(range(UNLABELED)),
        ignored=frozenset({UNLABELED}),
        ignored_id=UNLABELED,
    )


def scan(root: Path, split: str, *, labels: bool = True) -> list[Pair]:
    """Return the pairs of a split, sorted by name.

    Args:
        root: Folder of the dataset.
        split: Name of the split.
        labels: Require a label for each image; False: label files are not accessed.

    Raises:
        OcrnetError: The folder does not have the layout, or an image has no label or the reverse.
    """
    return scan_trees(root, split, layout=LAYOUT, labels=labels)
