"""Cityscapes in its official layout; the label table is copied from cityscapesscripts (helpers/labels.py)."""

from pathlib import Path
from typing import NamedTuple

from ocrnet.data.datasets.base import IGNORE, ClassTable, Pair
from ocrnet.data.datasets.files import no_images_error, pair, require_folders

LAYOUT = """the layout of Cityscapes is
  DATASET_DIR/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
  DATASET_DIR/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png
with SPLIT train, val or test; both archives are unpacked into one folder"""

IMAGE_END, LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"


class Label(NamedTuple):
    """A row of the official table: name, id in labelIds files, class index (255: not a class), category, RGB color."""

    name: str
    id: int
    train_id: int
    category: str
    color: tuple[int, int, int]


LABELS = (
    Label("unlabeled", 0, 255, "void", (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", (0, 0, 0)),
    Label("rectification border", 2, 255, "void", (0, 0, 0)),
    Label("out of roi", 3, 255, "void", (0, 0, 0)),
    Label("static", 4, 255, "void", (0, 0, 0)),
    Label("dynamic", 5, 255, "void", (111, 74, 0)),
    Label("ground", 6, 255, "void", (81, 0, 81)),
    Label("road", 7, 0, "flat", (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", (244, 35, 232)),
    Label("parking", 9, 255, "flat", (250, 170, 160)),
    Label("rail track", 10, 255, "flat", (230, 150, 140)),
    Label("building", 11, 2, "construction", (70, 70, 70)),
    Label("wall", 12, 3, "construction", (102, 102, 156)),
    Label("fence", 13, 4, "construction", (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", (180, 165, 180)),
    Label("bridge", 15, 255, "construction", (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", (150, 120, 90)),
    Label("pole", 17, 5, "object", (153, 153, 153)),
    Label("polegroup", 18, 255, "object", (153, 153, 153)),
    Label("traffic light", 19, 6, "object", (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", (107, 142, 35)),
    Label("terrain", 22, 9, "nature", (152, 251, 152)),
    Label("sky", 23, 10, "sky", (70, 130, 180)),
    Label("person", 24, 11, "human", (220, 20, 60)),
    Label("rider", 25, 12, "human", (255, 0, 0)),
    Label("car", 26, 13, "vehicle", (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", (0, 0, 110)),
    Label("train", 31, 16, "vehicle", (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", (119, 11, 32)),
    Label("license plate", -1, 255, "vehicle", (0, 0, 142)),
)


def classes(root: Path | None = None) -> ClassTable:
    """Return the 19 classes; the other ids are ignored, including -1, which uint8 label files store as 255.

    ``root`` is not used.
    """
    trained = sorted((label for label in LABELS if label.train_id != IGNORE), key=lambda label: label.train_id)
    return ClassTable(
        names=tuple(label.name for label in trained),
        palette=tuple(label.color for label in trained),
        ids=tuple(label.id for label in trained),
        ignored=frozenset(label.id % 256 for label in LABELS if label.train_id == IGNORE),
        categories=tuple(label.category for label in trained),
        ignored_id=0,  # unlabeled
    )


def scan(root: Path, split: str, *, labels: bool = True) -> list[Pair]:
    """Return the pairs of a split, sorted by ``CITY/NAME``.

    Args:
        root: Folder of the dataset.
        split: Name of the split.
        labels: Require a label for each image; False: label files are not accessed.

    Raises:
        OcrnetError: The folder does not have the layout, or an image has no label or the reverse.
    """
    require_folders(root, ["leftImg8bit", "gtFine"] if labels else ["leftImg8bit"], split, LAYOUT)
    images = _by_name(root / "leftImg8bit" / split, IMAGE_END)
    if not images:
        raise no_images_error(root / "leftImg8bit" / split, f"CITY/*{IMAGE_END}", LAYOUT)
    folder = root / "gtFine" / split
    expected = {name: folder / (name + LABEL_END) for name in images}
    return pair(images, expected, _by_name(folder, LABEL_END) if labels else None)


def _by_name(folder: Path, suffix: str) -> dict[str, Path]:
    paths = (path for path in folder.glob(f"*/*{suffix}") if not path.name.startswith("."))
    return {f"{path.parent.name}/{path.name.removesuffix(suffix)}": path for path in paths}
