"""Datasets by name: where the files lie and what the ids in them mean."""

import os
from pathlib import Path
from types import ModuleType

from ocrnet.datasets import camvid, cityscapes, folder
from ocrnet.datasets.base import ClassTable, Dataset, Pair
from ocrnet.errors import OcrnetError, nearest

__all__ = ["NAMES", "ClassTable", "Dataset", "Pair", "open_dataset"]

# Each offers classes(root) -> ClassTable, scan(root, split, *, labels) -> list[Pair] and its LAYOUT in words.
_LAYOUTS: dict[str, ModuleType] = {"cityscapes": cityscapes, "camvid": camvid, "folder": folder}
NAMES = tuple(_LAYOUTS)


def open_dataset(name: str, root: str | Path, split: str, *, labels: bool = True) -> Dataset:
    """Open one split; with ``labels`` every image must have its label, without it no label file is looked at.

    Raises `OcrnetError` on an unknown name, a missing folder, another layout, and missing or surplus files.
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
    return Dataset(layout.classes(path), layout.scan(path, split, labels=labels), path)
