"""Cityscapes as its authors lay it out: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY; labelIds are mapped while reading."""

from pathlib import Path

from ocrnet.datasets.base import IGNORE, ClassTable, Colour, Pair, pair_up
from ocrnet.errors import OcrnetError

IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"
LAYOUT = "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png"

# Label id, name, category, colour of the 19 evaluated classes in the order of their train ids (Cordts et al., CVPR 2016;
# the table of cityscapesscripts). All other ids, 0 to 33 and -1 (255 in a byte), are left out.
CLASSES: tuple[tuple[int, str, str, Colour], ...] = (
    (7, "road", "flat", (128, 64, 128)),
    (8, "sidewalk", "flat", (244, 35, 232)),
    (11, "building", "construction", (70, 70, 70)),
    (12, "wall", "construction", (102, 102, 156)),
    (13, "fence", "construction", (190, 153, 153)),
    (17, "pole", "object", (153, 153, 153)),
    (19, "traffic light", "object", (250, 170, 30)),
    (20, "traffic sign", "object", (220, 220, 0)),
    (21, "vegetation", "nature", (107, 142, 35)),
    (22, "terrain", "nature", (152, 251, 152)),
    (23, "sky", "sky", (70, 130, 180)),
    (24, "person", "human", (220, 20, 60)),
    (25, "rider", "human", (255, 0, 0)),
    (26, "car", "vehicle", (0, 0, 142)),
    (27, "truck", "vehicle", (0, 0, 70)),
    (28, "bus", "vehicle", (0, 60, 100)),
    (31, "train", "vehicle", (0, 80, 100)),
    (32, "motorcycle", "vehicle", (0, 0, 230)),
    (33, "bicycle", "vehicle", (119, 11, 32)),
)


def classes(root: Path) -> ClassTable:
    """Return the 19 classes; ``root`` is not looked at."""
    ids, names, categories, palette = zip(*CLASSES, strict=True)
    ignored = frozenset({*range(34), IGNORE} - set(ids))
    return ClassTable(names, palette, ids, ignored, categories, void_id=0)


def scan(root: Path, split: str, *, labelled: bool) -> list[Pair]:
    """List a split; with ``labelled``, each image needs its labelIds file."""
    image_dir, label_dir = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in (image_dir, label_dir) if labelled else (image_dir,):
        if not folder.is_dir():
            found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise OcrnetError(f"'{folder}' does not exist; '{root}' must hold {LAYOUT}, but holds {found}")
    images = {_name(p, image_dir, IMAGE): p for p in image_dir.glob(f"*/*{IMAGE}")}
    labels = {_name(p, label_dir, LABEL): p for p in label_dir.glob(f"*/*{LABEL}")} if labelled else {}
    return pair_up(images, labels, where=(image_dir, label_dir), labelled=labelled)


def _name(path: Path, folder: Path, ending: str) -> str:
    return path.relative_to(folder).as_posix().removesuffix(ending)
