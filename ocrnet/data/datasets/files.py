"""Find the files of a dataset, pair images with labels, and raise an error if the folder does not have the layout."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ocrnet.data.datasets.base import Pair
from ocrnet.utils.errors import OcrnetError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_SHOWN = 10


def scan_trees(root: Path, split: str, *, layout: str, labels: bool) -> list[Pair]:
    """Pair images/SPLIT/**/STEM.* with labels/SPLIT/**/STEM.png, sorted by the path below the split.

    Args:
        root: Folder of the dataset.
        split: Name of the split.
        layout: Description of the layout, for error messages.
        labels: Require a label for each image; False: label files are not accessed.

    Returns:
        The pairs.

    Raises:
        OcrnetError: The folder does not have the layout, a label is not a PNG, two files have the same path except for
            the suffix, or an image has no label or the reverse.
    """
    require_folders(root, ["images", "labels"] if labels else ["images"], split, layout)
    images, folder = _by_stem(root / "images" / split, IMAGES), root / "labels" / split
    if not images:
        raise no_images_error(root / "images" / split, f"images ({' '.join(IMAGES)})", layout)
    expected = {name: folder / f"{name}.png" for name in images}
    existing = _by_stem(folder, (".png",)) if labels else None
    if existing is not None and (missing := images.keys() - existing.keys()):
        other_files = _by_stem(folder, tuple(suffix for suffix in IMAGES if suffix != ".png"))
        if not_png := [other_files[name] for name in sorted(missing & other_files.keys())]:
            raise OcrnetError(
                f"{len(not_png)} of {len(images)} labels are not PNG files:{_format_paths(not_png)}\n"
                "export them again as PNG from the original annotations: JPEG changes the ids"
            )
    return pair(images, expected, existing)


def pair(images: Mapping[str, Path], expected: Mapping[str, Path], existing: Mapping[str, Path] | None) -> list[Pair]:
    """Pair images with labels by name.

    Args:
        images: Image file of each name.
        expected: Expected label file of each name.
        existing: Existing label file of each name; None: return pairs without labels.

    Returns:
        The pairs, sorted by name.

    Raises:
        OcrnetError: Images have no label, or labels have no image. The message lists the expected paths of missing
            labels, and the labels without an image.
    """
    if existing is None:
        return [Pair(name, images[name], None) for name in sorted(images)]
    problems = []
    if missing := sorted(images.keys() - existing.keys()):
        problems.append(
            f"{len(missing)} of {len(images)} images have no label:{_format_paths(expected[n] for n in missing)}"
        )
    if surplus := sorted(existing.keys() - images.keys()):
        problems.append(
            f"{len(surplus)} of {len(existing)} labels have no image:{_format_paths(existing[n] for n in surplus)}"
        )
    if problems:
        raise OcrnetError("\n".join(problems) + "\nadd the missing files, or remove the files without a counterpart")
    return [Pair(name, images[name], existing[name]) for name in sorted(images)]


def require_folders(root: Path, tops: Sequence[str], split: str, layout: str) -> None:
    """Check that every ROOT/TOP/SPLIT is a folder.

    Args:
        root: Folder of the dataset.
        tops: Names of the required folders below ``root``.
        split: Name of the split.
        layout: Description of the layout.

    Raises:
        OcrnetError: A folder is missing. The message lists the entries of its parent folder, and the layout.
    """
    for top in tops:
        for folder in (root / top, root / top / split):
            if not folder.is_dir():
                raise OcrnetError(
                    f"{folder} does not exist; {folder.parent} holds {listing(folder.parent)}"
                    f"{_suggest_root(root, tops)}\n{layout}"
                )


def no_images_error(folder: Path, description: str, layout: str) -> OcrnetError:
    """Return the error for a split without images.

    Args:
        folder: Folder of the split.
        description: Description of the expected files.
        layout: Description of the layout.
    """
    return OcrnetError(f"{folder} holds no {description}; it holds {listing(folder)}\n{layout}")


def listing(folder: Path) -> str:
    """Return the first ten entries of a folder as text, or ``nothing`` if it is empty."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more if names else "nothing"


def _suggest_root(root: Path, tops: Iterable[str]) -> str:
    """Return a hint that suggests a folder up to two levels above or one below that has the layout, or ""."""
    absolute = root.absolute()
    below = sorted(entry for entry in absolute.iterdir() if entry.is_dir())
    for folder in (*absolute.parents[:2], *below):
        if all((folder / top).is_dir() for top in tops):
            return f"; did you mean data.dataset_dir={folder}?"
    return ""


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files below a folder, by relative path without suffix; hidden files and folders are left out."""
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() not in suffixes:
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise OcrnetError(f"{files[name]} and {path} have the same label file; rename one of them")
            files[name] = path
    return files


def _format_paths(paths: Iterable[Path]) -> str:
    all_paths = list(paths)
    more = [f"and {len(all_paths) - MAX_SHOWN} more"] if len(all_paths) > MAX_SHOWN else []
    return "".join(f"\n  {line}" for line in [*map(str, all_paths[:MAX_SHOWN]), *more])
