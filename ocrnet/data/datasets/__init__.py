"""Datasets by name: where the files lie and what the ids in them mean."""

import dataclasses
import os
from pathlib import Path
from types import ModuleType

from ocrnet.data.datasets import camvid, cityscapes, folder
from ocrnet.data.datasets.base import IGNORE, ClassTable, Dataset, Pair
from ocrnet.utils.errors import OcrnetError, nearest

__all__ = ["NAMES", "ClassTable", "Dataset", "Pair", "open_dataset"]

# Each offers classes(root) -> ClassTable, scan(root, split, *, labels) -> list[Pair] and its LAYOUT in words.
_LAYOUTS: dict[str, ModuleType] = {"cityscapes": cityscapes, "camvid": camvid, "folder": folder}
NAMES = tuple(_LAYOUTS)


def open_dataset(
    name: str, root: str | Path, split: str, *, labels: bool = True, ignore_label: int = IGNORE
) -> Dataset:
    """Open one split; with ``labels`` every image must have its label, without it no label file is looked at.

    ``ignore_label`` is an id in label files that is left out, beside those that the layout leaves out itself. Raises
    `OcrnetError` on an unknown name, a missing folder, another layout, and missing or surplus files.
    """
    if name not in _LAYOUTS:
        raise OcrnetError(f"data.name: '{name}' is no dataset{nearest(name, NAMES)} ({', '.join(NAMES)})")
    layout = _LAYOUTS[name]
    path = Path(os.path.expanduser(root))
    if not str(root) or not path.is_dir():
        what = "is no folder" if str(root) and path.exists() else "does not exist"
        place = "the YAML (config/cityscapes.yml)" if name == "cityscapes" else "the YAML"
        raise OcrnetError(
            f"data.dataset_dir: '{root}' {what}; set it in {place} or with --set data.dataset_dir=...\n{layout.LAYOUT}"
        )
    classes = layout.classes(path)
    if ignore_label in classes.ids:
        taken = classes.names[classes.ids.index(ignore_label)]
        raise OcrnetError(f"data.ignore_label: {ignore_label} is the id of the class '{taken}'; give an id of no class")
    classes = dataclasses.replace(classes, ignored=classes.ignored | {ignore_label})
    return Dataset(classes, layout.scan(path, split, labels=labels), path)
