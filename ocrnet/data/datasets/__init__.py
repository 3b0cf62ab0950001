"""Datasets by name: file layout and meaning of the label ids."""

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
    """Open one split of a dataset.

    Args:
        name: Layout of the dataset, one of NAMES.
        root: Folder of the dataset; a leading ~ is expanded.
        split: Name of the split.
        labels: Require a label for every image; False: label files are not accessed.
        ignore_label: Additional id in label files to ignore, besides the ids that the layout ignores.

    Raises:
        OcrnetError: The name is unknown, the folder is missing, the layout differs, files are missing or surplus, or
            ``ignore_label`` is the id of a class.
    """
    if name not in _LAYOUTS:
        raise OcrnetError(f"data.name: '{name}' is not a known dataset{nearest(name, NAMES)} ({', '.join(NAMES)})")
    layout = _LAYOUTS[name]
    path = Path(os.path.expanduser(root))
    if not str(root) or not path.is_dir():
        what = "is not a folder" if str(root) and path.exists() else "does not exist"
        place = "the YAML (config/cityscapes.yml)" if name == "cityscapes" else "the YAML"
        raise OcrnetError(
            f"data.dataset_dir: '{root}' {what}; set it in {place} or with --set data.dataset_dir=...\n{layout.LAYOUT}"
        )
    classes = layout.classes(path)
    if ignore_label in classes.ids:
        taken = classes.names[classes.ids.index(ignore_label)]
        raise OcrnetError(
            f"data.ignore_label: {ignore_label} is the id of the class '{taken}'; give an id that no class has"
        )
    classes = dataclasses.replace(classes, ignored=classes.ignored | {ignore_label})
    return Dataset(classes, layout.scan(path, split, labels=labels), path)
