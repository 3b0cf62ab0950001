"""The datasets: each module offers `classes(root)` and `scan(root, split, labelled=...)`; `open_dataset` chooses one."""

from pathlib import Path

from ocrnet.datasets import camvid, cityscapes, folder
from ocrnet.datasets.base import ClassTable, Dataset, Pair
from ocrnet.errors import OcrnetError

__all__ = ["ClassTable", "Dataset", "Pair", "open_dataset"]

DATASETS = {"cityscapes": cityscapes, "camvid": camvid, "folder": folder}


def open_dataset(name: str, root: str | Path, split: str, *, labelled: bool = True) -> Dataset:
    """List a split of the dataset at ``root``; with ``labelled``, missing or surplus labels are an `OcrnetError`."""
    path = Path(root)
    if not path.is_dir():
        where = "config/cityscapes.yml" if name == "cityscapes" else "your config"
        what = "is not a folder" if path.exists() else "does not exist"
        raise OcrnetError(f"data.dataset_dir '{root}' {what}; set it in {where}, or with --set data.dataset_dir=FOLDER")
    module = DATASETS[name]
    return Dataset(module.classes(path), module.scan(path, split, labelled=labelled), path)
