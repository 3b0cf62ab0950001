"""What every dataset is: a table of classes, and a list of image and label files that one class reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ocrnet.errors import OcrnetError
from ocrnet.images import read_image, read_label

IGNORE = 255
UNKNOWN = 254  # only inside the table below; a class index never reaches it
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a dataset: names, colours, the label id that stands for each in files, and the ids left out."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ids: tuple[int, ...]
    ignored: frozenset[int] = frozenset({IGNORE})
    categories: tuple[str, ...] = ()
    void_id: int = IGNORE  # what 255 becomes in a file

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(256, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORE
        table[list(self.ids)] = np.arange(len(self), dtype=np.uint8)
        return table

    def to_indices(self, ids: np.ndarray, source: Path) -> np.ndarray:
        """Turn label ids uint8 H,W into class indices, 255 where left out; an unknown id is an error naming ``source``."""
        indices = self._table[ids]
        if len(self) < UNKNOWN and (indices == UNKNOWN).any():
            strangers = np.unique(ids[indices == UNKNOWN]).tolist()
            raise OcrnetError(
                f"label '{source}' has ids {strangers}, which are no class; the classes are {_ranges(self.ids)}, "
                f"left out are {_ranges(self.ignored)}"
            )
        return indices

    def to_ids(self, indices: np.ndarray) -> np.ndarray:
        """Turn class indices uint8 into the label ids of files."""
        table = np.full(256, self.void_id, np.uint8)
        table[: len(self)] = self.ids
        return table[indices]

    def colour(self, indices: np.ndarray) -> np.ndarray:
        """Paint class indices uint8 H,W as uint8 H,W,3 RGB, black where left out."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.palette
        return table[indices]


@dataclass(frozen=True)
class Pair:
    """One sample's files; ``name`` is unique within its split."""

    name: str
    image: Path
    label: Path | None


class Dataset:
    """A split of a dataset; indices run from 0 in the order of the names."""

    def __init__(self, classes: ClassTable, pairs: Sequence[Pair], root: Path) -> None:
        self.classes, self.pairs, self.root = classes, tuple(pairs), root

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the name of a sample."""
        return self.pairs[index].name

    def image(self, index: int) -> np.ndarray:
        """Return an image uint8 H,W,3 RGB."""
        return read_image(self.pairs[index].image)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image uint8 H,W,3 RGB and its class indices uint8 H,W, 255 where left out."""
        pair = self.pairs[index]
        assert pair.label is not None, f"{pair.name} was opened without labels"
        image, ids = read_image(pair.image), read_label(pair.label)
        if image.shape[:2] != ids.shape:
            raise OcrnetError(
                f"image '{pair.image}' is {image.shape[0]}x{image.shape[1]} (height x width), but its label "
                f"'{pair.label}' is {ids.shape[0]}x{ids.shape[1]}; they must be of one size"
            )
        return image, self.classes.to_indices(ids, pair.label)


def pair_up(
    images: dict[str, Path], labels: dict[str, Path], *, where: tuple[Path, Path], labelled: bool
) -> list[Pair]:
    """Match images and labels by name, sorted; with ``labelled``, each must have its counterpart."""
    if not images:
        raise OcrnetError(f"no images in '{where[0]}'; look at data.dataset_dir")
    if labelled:
        missing, surplus = sorted(images.keys() - labels.keys()), sorted(labels.keys() - images.keys())
        problems = [
            f"{len(names)} {what} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
            for names, what in ((missing, "images without a label"), (surplus, "labels without an image"))
            if names
        ]
        if problems:
            raise OcrnetError(f"'{where[0]}' and '{where[1]}' do not match: {'; '.join(problems)}")
    return [Pair(name, images[name], labels.get(name) if labelled else None) for name in sorted(images)]


def _ranges(ids: Iterable[int]) -> str:
    """Return sorted ids with runs joined: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
