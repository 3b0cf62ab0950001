"""Synthetic street scenes in the Cityscapes layout, with which every feature can be tried within minutes."""

from pathlib import Path

import numpy as np

from ocrnet.data.datasets.cityscapes import IMAGE_END, LABEL_END, LABELS
from ocrnet.data.datasets.street import scene
from ocrnet.data.image_io import write_png
from ocrnet.utils.errors import OcrnetError

CITY, SMALLEST = "demo", (32, 64)
COLOR_END = "_gtFine_color.png"


def write(
    root: str | Path,
    *,
    train: int = 16,
    val: int = 4,
    test: int = 2,
    size: tuple[int, int] = (512, 1024),
    seed: int = 0,
) -> None:
    """Write synthetic scenes to a new or empty folder; the test split has no labels.

    With the same versions of NumPy and OpenCV, a scene depends only on (seed, split, scene number). All 19 classes
    occur; the rarest occur in every fourth scene.

    Args:
        root: New or empty folder.
        train: Number of training scenes.
        val: Number of validation scenes.
        test: Number of test scenes.
        size: Height and width in pixels.
        seed: Random seed, 0 or more.

    Raises:
        OcrnetError: The folder is not empty, a count or the seed is negative, or the size is too small.
    """
    root, counts = Path(root), {"train": train, "val": val, "test": test}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OcrnetError(f"'{root}' exists and is not an empty folder; give a new one")
    if size[0] < SMALLEST[0] or size[1] < SMALLEST[1]:
        raise OcrnetError(f"size {size[0]}x{size[1]} is too small; the minimum is {SMALLEST[0]}x{SMALLEST[1]} (h x w)")
    for split, count in counts.items():
        if count < 0:
            raise OcrnetError(f"{split}: {count} scenes; give 0 or more")
    if seed < 0:
        raise OcrnetError(f"seed: {seed}; give 0 or more")
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            rng = np.random.default_rng((seed, number, index))
            image, label = scene.draw(size, rng, index=index)
            _write_scene(root, split, index, image, None if split == "test" else label)


def _write_scene(root: Path, split: str, index: int, image: np.ndarray, label: np.ndarray | None) -> None:
    name = f"{CITY}_{index:06d}_000019"
    write_png(root / "leftImg8bit" / split / CITY / (name + IMAGE_END), image)
    if label is not None:
        write_png(root / "gtFine" / split / CITY / (name + LABEL_END), label)
        write_png(root / "gtFine" / split / CITY / (name + COLOR_END), _COLORS[label])


def _color_table() -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    for label in LABELS:
        table[label.id % 256] = label.color
    return table


_COLORS = _color_table()  # official RGB colors by id in label files, including those of ignored ids
