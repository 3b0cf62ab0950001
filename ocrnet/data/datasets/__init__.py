"""Open a dataset by the name of its layout, which defines the file names and the label ids."""

import dataclasses
import os
from pathlib import Path
from types import ModuleType

from ocrnet.data.datasets import camvid, cityscapes, folder
from ocrnet.data.datasets.base import IGNORE, ClassTable, Dataset, Pair
from ocrnet.utils.errors import OcrnetError, nearest

__all__ = ["NAMES", "ClassTable", "Dataset", "Pair", "open_dataset"]

# Each module defines classes(root) -> ClassTable, scan(root, split, *, labels) -> list[Pair] and LAYOUT, a description.
_LAYOUTS: dict[str, ModuleType] = {"cityscapes": cityscapes, "camvid": camvid, "folder": folder}
NAMES = tuple(_LAYOUTS)


def open_dataset(
    name: str, root: str | Path, split: str, *, labels: bool = True, ignore_label: int = IGNORE
) -> Dataset:
    """Open one split of a dataset and check that all files exist.

    Args:
        name: Layout of the dataset, one of `NAMES`.
        root: Folder of the dataset; a leading ~ is expanded.
        split: Name of the split.
        labels: Require a label for every image; False: label files are not accessed.
        ignore_label: Id in label files to ignore, in addition to the ids that the layout ignores.

    Returns:
        The split; no image or label is read yet.

    Raises:
        OcrnetError: The name is unknown, the folder does not exist or does not have the layout, an image has no label
            or the reverse, or ``ignore_label`` is the id of a class.
    """
    if name not in _LAYOUTS:
        raise OcrnetError(f"data.name: '{name}' is not a known dataset{nearest(name, NAMES)} ({', '.join(NAMES)})")
    layout = _LAYOUTS[name]
    path = Path(os.path.expanduser(root))
    if not str(root) or not path.is_dir():
        problem = "is not a folder" if str(root) and path.exists() else "does not exist"
        location = "the YAML (config/cityscapes.yml)" if name == "cityscapes" else "the YAML"
        raise OcrnetError(
            f"data.dataset_dir: '{root}' {problem}; set it in {location} or with --set data.dataset_dir=...\n"
            f"{layout.LAYOUT}"
        )
    classes = layout.classes(path)
    if ignore_label in classes.ids:
        class_name = classes.names[classes.ids.index(ignore_label)]
        raise OcrnetError(
            f"data.ignore_label: {ignore_label} is the id of the class '{class_name}'; give an id that no class has"
        )
    classes = dataclasses.replace(classes, ignored=classes.ignored | {ignore_label})
    return Dataset(classes, layout.scan(path, split, labels=labels), path)
