"""The parts that all datasets share: class table, pairs of image and label files, and reading of images and labels."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from ocrnet.data.image_io import read_image, read_label
from ocrnet.utils.errors import OcrnetError

IGNORE = 255


@dataclass(frozen=True)
class ClassTable:
    """The classes of a dataset; position i of each tuple belongs to class index i.

    Attributes:
        names: Class names.
        palette: RGB colors.
        ids: Ids in label files.
        ignored: Ids in label files that are ignored; they become class index 255.
        categories: Names of groups of classes, or empty.
        ignored_id: Id that is written to label files for class index 255.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ids: tuple[int, ...]
    ignored: frozenset[int]
    categories: tuple[str, ...] = ()
    ignored_id: int = IGNORE

    def __post_init__(self) -> None:
        count = len(self.names)
        assert 1 <= count <= IGNORE, f"{count} classes, not 1 to {IGNORE}"
        assert len(self.palette) == len(set(self.ids)) == count, "names, palette and ids differ in number"
        assert len(self.categories) in (0, count), f"{len(self.categories)} categories for {count} classes"
        assert not self.ignored.intersection(self.ids), "an id is both a class and ignored"

    def __len__(self) -> int:
        return len(self.names)

    def to_indices(self, ids: np.ndarray, source: str | Path) -> np.ndarray:
        """Convert the uint8 H,W ids of a label file to uint8 H,W class indices.

        Raise `OcrnetError`, which names ``source`` and the ids, if ids are unknown.
        """
        unknown = cv2.LUT(ids, self._unknown)  # ten times as fast as NumPy indexing
        if unknown.any():
            unknown_ids = ", ".join(map(str, np.unique(ids[unknown > 0])))
            raise OcrnetError(
                f"{source} holds the unknown id {unknown_ids}; known ids: {_ranges(self.ids)} (classes) and "
                f"{_ranges(self.ignored) or 'none'} (ignored); to ignore another id: --set data.ignore_label=ID"
            )
        return cv2.LUT(ids, self._index_of_id)

    def to_ids(self, indices: np.ndarray) -> np.ndarray:
        """Convert uint8 H,W class indices to uint8 H,W ids of label files; 255 becomes ``ignored_id``."""
        self._check(indices)
        table = np.full(256, self.ignored_id, np.uint8)
        table[: len(self)] = self.ids
        return table[indices]

    def color(self, indices: np.ndarray) -> np.ndarray:
        """Convert uint8 H,W class indices to uint8 H,W,3 RGB; 255 becomes black."""
        self._check(indices)
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.palette
        return table[indices]

    def _check(self, indices: np.ndarray) -> None:
        highest = int(indices[indices != IGNORE].max(initial=0))
        if highest >= len(self):
            raise ValueError(f"class index {highest} is out of range; allowed: 0 to {len(self) - 1} and {IGNORE}")

    @cached_property
    def _index_of_id(self) -> np.ndarray:
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.ids)] = np.arange(len(self))
        return table

    @cached_property
    def _unknown(self) -> np.ndarray:
        table = np.ones(256, np.uint8)
        table[[*self.ids, *self.ignored]] = 0
        return table


@dataclass(frozen=True)
class Pair:
    """The files of one image; ``name`` is unique within its split, e.g. ``aachen/aachen_000000_000019``."""

    name: str
    image: Path
    label: Path | None


class Dataset:
    """One split of a dataset; ``read(i)`` returns image and label as arrays."""

    def __init__(self, classes: ClassTable, pairs: Sequence[Pair], root: str | Path) -> None:
        self.classes, self.pairs, self.root = classes, tuple(pairs), Path(root)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labeled(self) -> bool:
        """Whether every image has a label."""
        return all(pair.label is not None for pair in self.pairs)

    @property
    def identity(self) -> str:
        """A text with the number of images and a CRC-32 of their names, to compare the dataset between machines."""
        names = "\n".join(pair.name for pair in self.pairs)
        return f"{len(self)}, the CRC-32 of their names is {zlib.crc32(names.encode()):08x}"

    def name(self, i: int) -> str:
        """Return the name of image ``i``."""
        return self.pairs[i].name

    def path(self, i: int) -> Path:
        """Return the path of image ``i``."""
        return self.pairs[i].image

    def image(self, i: int) -> np.ndarray:
        """Return image ``i``, uint8 H,W,3 RGB; raise `OcrnetError`, which names the file, if it is unreadable."""
        return read_image(self.path(i))

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image ``i``, uint8 H,W,3 RGB, and its label, uint8 H,W: class indices, and 255 where ignored.

        Raise `OcrnetError`, which names the file, if a file is unreadable, the label holds an unknown id, image and
        label differ in size, or the dataset was opened without labels.
        """
        pair = self.pairs[i]
        if pair.label is None:
            raise OcrnetError(f"{pair.image} was opened without a label; training and evaluation need labels")
        image, ids = read_image(pair.image), read_label(pair.label)
        if image.shape[:2] != ids.shape:
            raise OcrnetError(
                f"{pair.image} is {image.shape[0]}x{image.shape[1]} (height x width), "
                f"its label {pair.label} {ids.shape[0]}x{ids.shape[1]}; the sizes must match"
            )
        return image, self.classes.to_indices(ids, pair.label)


def _ranges(ids: Sequence[int] | frozenset[int]) -> str:
    """Format ids compactly: ``0-3, 7, 9-10``."""
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def colors() -> Iterator[tuple[int, int, int]]:
    """Yield the colors of the Pascal VOC color map, without black.

    Bits 0, 3, 6 and 9 of a color's number become the highest bits of R, bits 1, 4 and 7 of G, bits 2, 5 and 8 of B.
    """
    for number in range(1, 1 << 10):
        color = [0, 0, 0]
        for bit in range(10):
            color[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        yield color[0], color[1], color[2]
