"""Resolve `ocrnet predict SOURCE` to images and videos: a file, folder, pattern or URL; each result has a name."""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import cv2
import numpy as np

from ocrnet.data.datasets.files import IMAGES, listing
from ocrnet.data.image_io import decode_image, read_image
from ocrnet.predict import download, video
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError

VIDEOS = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp",
    ".ogv",
)  # fmt: skip

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Source:
    """An image or a video.

    ``place`` is its path or URL. ``name`` is the unique name of its results, to which each result appends its suffix.
    """

    name: str
    place: str
    kind: Kind = "image"

    @property
    def shown(self) -> str:
        """``place`` without the password of a URL, safe to log and to write."""
        return urls.scrub(self.place)

    def read(self) -> np.ndarray:
        """Return the image, uint8 H,W,3 RGB, in upright orientation; raise `OcrnetError` if it cannot be read."""
        if is_url(self.place):
            return decode_image(download.image(self.place), self.shown, upright=True)
        return read_image(self.place, upright=True)


def find(source: str, output: str | Path, *, offline: bool = False) -> list[Source]:
    """Return the sources for a path, a pattern or a URL; nothing is downloaded yet.

    Args:
        source: A file, a folder (searched recursively), a glob pattern, or an http(s) URL.
        output: The folder of the results. Folders and patterns skip files in it, and hidden files.
        offline: Forbid URLs.

    Returns:
        The sources, sorted by path.

    Raises:
        OcrnetError: There is no image or video, or ``offline`` forbids the URL.
    """
    if "://" in source:
        download.check_url(source, offline=offline)
        return [Source(download.name_of(source), source)]
    path = Path(source)
    if path.is_file():
        return [Source(path.stem, source, _kind(path))]
    if path.is_dir():
        if path.resolve() == Path(output).resolve():
            raise OcrnetError(f"--output '{output}' is the folder of the images; give another --output")
        found = _below(path, path.rglob("*"), output)
        if not found:
            raise OcrnetError(
                f"'{source}' holds no images ({' '.join(IMAGES)}) or videos ({' '.join(VIDEOS)}); "
                f"it holds {listing(path)}"
            )
        return _named(path, found)
    if not glob.has_magic(source):
        raise OcrnetError(f"'{source}' does not exist; give an image, a video, a folder, a quoted pattern, or a URL")
    root = Path(re.split(r"[^/]*[*?\[]", source, maxsplit=1)[0])
    found = _below(root, map(Path, glob.glob(source, recursive=True)), output)
    if not found:
        raise OcrnetError(f"'{source}' matches no images ({' '.join(IMAGES)}) or videos ({' '.join(VIDEOS)})")
    return _named(root, found)


def is_url(place: str) -> bool:
    """Return whether the place of a source is a URL."""
    return "://" in place


def _below(root: Path, paths: Iterable[Path], output: str | Path) -> list[Path]:
    results = Path(output).resolve()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in (*IMAGES, *VIDEOS)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and results not in path.resolve().parents
    )


def _named(root: Path, paths: Sequence[Path]) -> list[Source]:
    """Name each path relative to ``root``, without its suffix unless the results of two sources would then collide."""
    kinds = [_kind(path) for path in paths]
    whole = [path.relative_to(root).as_posix() for path in paths]
    stems = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    alike = _alike(stems, kinds)
    names = [name if number in alike else stem for number, (stem, name) in enumerate(zip(stems, whole, strict=True))]
    if _alike(names, kinds):  # "a.jpg" and "a.png" keep their suffixes, and "a.jpg.png" without its own collides
        names = whole
        if alike := _alike(names, kinds):
            raise OcrnetError(f"'{paths[min(alike)]}' and another source would write the same file; rename one of them")
    return [Source(name, str(path), kind) for name, path, kind in zip(names, paths, kinds, strict=True)]


def _alike(names: Sequence[str], kinds: Sequence[Kind]) -> set[int]:
    """Return the indices of duplicate names, and of names whose results collide with files or folders of another."""
    endings = {"image": (".png",), "video": ("", ".mp4", ".jsonl")}  # a folder of the video's name holds its frames
    files = [[name + ending for ending in endings[kind]] for name, kind in zip(names, kinds, strict=True)]
    named, often = Counter(names), Counter(file for some in files for file in some)
    folders = {folder.as_posix() for name in set(names) for folder in PurePosixPath(name).parents}
    return {
        number
        for number, (name, some) in enumerate(zip(names, files, strict=True))
        if named[name] > 1 or any(often[file] > 1 or file in folders for file in some)
    }


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix in IMAGES or suffix in VIDEOS:
        return "image" if suffix in IMAGES else "video"
    if not video.can_take(path):
        return "image"
    return "video" if not cv2.haveImageReader(str(path)) and video.opens(path) else "image"
