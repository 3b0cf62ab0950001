"""Find the files of a dataset, pair images with labels, and report a different layout."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ocrnet.data.datasets.base import Pair
from ocrnet.utils.errors import OcrnetError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SHOWN = 10


def scan_trees(root: Path, split: str, *, layout: str, labels: bool) -> list[Pair]:
    """Pair images/SPLIT/**/STEM.* with labels/SPLIT/**/STEM.png, sorted by the path below the split.

    Args:
        root: Folder of the dataset.
        split: Name of the split.
        layout: Description of the layout, for error messages.
        labels: Require a label for each image; False: pair without labels.

    Returns:
        The pairs.

    Raises:
        OcrnetError: The layout differs, a label is not a PNG, two files share one stem, or an image or a label has no
            counterpart.
    """
    need_folders(root, ["images", "labels"] if labels else ["images"], split, layout)
    images, folder = _by_stem(root / "images" / split, IMAGES), root / "labels" / split
    if not images:
        raise empty(root / "images" / split, f"images ({' '.join(IMAGES)})", layout)
    wanted = {name: folder / f"{name}.png" for name in images}
    found = _by_stem(folder, (".png",)) if labels else None
    if found is not None and (absent := images.keys() - found.keys()):
        others = _by_stem(folder, tuple(suffix for suffix in IMAGES if suffix != ".png"))
        if odd := [others[name] for name in sorted(absent & others.keys())]:
            raise OcrnetError(
                f"{len(odd)} of {len(images)} labels are not PNG files:{_listed(odd)}\n"
                "write them as PNG from their source: JPEG changes the ids"
            )
    return pair(images, wanted, found)


def pair(images: Mapping[str, Path], wanted: Mapping[str, Path], found: Mapping[str, Path] | None) -> list[Pair]:
    """Pair images with labels by name.

    Args:
        images: Image file of each name.
        wanted: Expected label file of each name.
        found: Existing label file of each name; None: pair without labels.

    Returns:
        The pairs, sorted by name.

    Raises:
        OcrnetError: Images have no label or labels have no image. One error covers all of them; it gives the missing
            labels as in ``wanted``.
    """
    if found is None:
        return [Pair(name, images[name], None) for name in sorted(images)]
    problems = []
    if missing := sorted(images.keys() - found.keys()):
        problems.append(f"{len(missing)} of {len(images)} images have no label:{_listed(wanted[n] for n in missing)}")
    if surplus := sorted(found.keys() - images.keys()):
        problems.append(f"{len(surplus)} of {len(found)} labels have no image:{_listed(found[n] for n in surplus)}")
    if problems:
        raise OcrnetError("\n".join(problems) + "\nadd the missing files, or remove the files without a counterpart")
    return [Pair(name, images[name], found[name]) for name in sorted(images)]


def need_folders(root: Path, tops: Sequence[str], split: str, layout: str) -> None:
    """Raise an error unless every ROOT/TOP/SPLIT is a folder.

    Args:
        root: Folder of the dataset.
        tops: Names of the required folders below ``root``.
        split: Name of the split.
        layout: Description of the layout.

    Raises:
        OcrnetError: A folder is missing. The message lists the existing entries and the layout.
    """
    for top in tops:
        for folder in (root / top, root / top / split):
            if not folder.is_dir():
                raise OcrnetError(
                    f"{folder} does not exist; {folder.parent} holds {listing(folder.parent)}"
                    f"{_better_root(root, tops)}\n{layout}"
                )


def empty(folder: Path, what: str, layout: str) -> OcrnetError:
    """Return the error for a split without images.

    Args:
        folder: Folder of the split.
        what: Description of the expected files.
        layout: Description of the layout.
    """
    return OcrnetError(f"{folder} holds no {what}; it holds {listing(folder)}\n{layout}")


def listing(folder: Path) -> str:
    """Return the first ten entries of a folder as text, or ``nothing`` if it is empty."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "nothing"


def _better_root(root: Path, tops: Iterable[str]) -> str:
    """Return a hint at a folder up to two levels above or one level below that has the layout, or an empty string."""
    absolute = root.absolute()
    below = sorted(entry for entry in absolute.iterdir() if entry.is_dir())
    for folder in (*absolute.parents[:2], *below):
        if all((folder / top).is_dir() for top in tops):
            return f"; did you mean data.dataset_dir={folder}?"
    return ""


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Map the path of each file below a folder, without its suffix, to the file; skip hidden files and folders."""
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() not in suffixes:
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise OcrnetError(f"{found[name]} and {path} have the same label file; rename one of them")
            found[name] = path
    return found


def _listed(paths: Iterable[Path]) -> str:
    every = list(paths)
    more = [f"and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return "".join(f"\n  {line}" for line in [*map(str, every[:SHOWN]), *more])
