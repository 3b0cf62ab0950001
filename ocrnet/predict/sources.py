"""The images and videos that a SOURCE of `ocrnet predict` means: a file, a folder, a pattern or a URL."""

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

    ``place`` is its path or URL. ``name`` is the unique name of its output files, without their suffix.
    """

    name: str
    place: str
    kind: Kind = "image"

    @property
    def shown(self) -> str:
        """The path or URL without credentials, safe to log."""
        return urls.scrub(self.place)

    def read(self) -> np.ndarray:
        """Return the image, uint8 H,W,3 RGB, in upright orientation; raise `OcrnetError` if it cannot be read."""
        if is_url(self.place):
            return decode_image(download.image(self.place), self.shown, upright=True)
        return read_image(self.place, upright=True)


def find(source: str, output: str | Path, *, offline: bool = False) -> list[Source]:
    """Return the images and videos for a path, a pattern or a URL, without downloading.

    Args:
        source: A file, a folder (searched recursively), a glob pattern, or an http(s) URL.
        output: The output folder. Files in it, and hidden files, are not part of a folder or pattern.
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
            raise OcrnetError(f"--output '{output}' is the folder of the images; choose another --output")
        paths = _select_files(path, path.rglob("*"), output)
        if not paths:
            raise OcrnetError(
                f"'{source}' holds no images ({' '.join(IMAGES)}) or videos ({' '.join(VIDEOS)}); "
                f"it holds {listing(path)}"
            )
        return _name_sources(path, paths)
    if not glob.has_magic(source):
        raise OcrnetError(f"'{source}' does not exist; use an image, a video, a folder, a quoted pattern or a URL")
    root = Path(re.split(r"[^/]*[*?\[]", source, maxsplit=1)[0])
    paths = _select_files(root, map(Path, glob.glob(source, recursive=True)), output)
    if not paths:
        raise OcrnetError(f"'{source}' matches no images ({' '.join(IMAGES)}) or videos ({' '.join(VIDEOS)})")
    return _name_sources(root, paths)


def is_url(place: str) -> bool:
    """Return whether ``place``, a path or URL, is a URL."""
    return "://" in place


def _select_files(root: Path, paths: Iterable[Path], output: str | Path) -> list[Path]:
    results = Path(output).resolve()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in (*IMAGES, *VIDEOS)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and results not in path.resolve().parents
    )


def _name_sources(root: Path, paths: Sequence[Path]) -> list[Source]:
    """Return the sources for paths, named relative to ``root``, without suffix unless output files would collide."""
    kinds = [_kind(path) for path in paths]
    full_names = [path.relative_to(root).as_posix() for path in paths]
    stems = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    colliding = _colliding(stems, kinds)
    names = [
        name if number in colliding else stem for number, (stem, name) in enumerate(zip(stems, full_names, strict=True))
    ]
    if _colliding(names, kinds):  # "a.jpg.png" without its suffix collides with "a.jpg", which keeps its suffix
        names = full_names
        if colliding := _colliding(names, kinds):
            raise OcrnetError(
                f"'{paths[min(colliding)]}' and another source would write the same file; rename one of them"
            )
    return [Source(name, str(path), kind) for name, path, kind in zip(names, paths, kinds, strict=True)]


def _colliding(names: Sequence[str], kinds: Sequence[Kind]) -> set[int]:
    """Return the indices of duplicate names, and of names whose output files collide with those of another source."""
    # The empty ending is the folder with the name of the video, which contains its frames.
    endings = {"image": (".png",), "video": ("", ".mp4", ".jsonl")}
    files = [[name + ending for ending in endings[kind]] for name, kind in zip(names, kinds, strict=True)]
    name_counts, file_counts = Counter(names), Counter(file for some in files for file in some)
    folders = {folder.as_posix() for name in set(names) for folder in PurePosixPath(name).parents}
    return {
        number
        for number, (name, some) in enumerate(zip(names, files, strict=True))
        if name_counts[name] > 1 or any(file_counts[file] > 1 or file in folders for file in some)
    }


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix in IMAGES or suffix in VIDEOS:
        return "image" if suffix in IMAGES else "video"
    if not video.is_safe_path(path):
        return "image"
    return "video" if not cv2.haveImageReader(str(path)) and video.is_video(path) else "image"
