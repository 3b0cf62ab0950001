"""Predictions as files: an image or a folder in; overlays, class indices and colour maps out."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ocrnet import cost
from ocrnet.config import Eval
from ocrnet.datasets.files import IMAGES, listing
from ocrnet.errors import OcrnetError
from ocrnet.images import read_image, write_png
from ocrnet.model import Model
from ocrnet.passes import cuts, make_windows
from ocrnet.spec import Arch
from ocrnet.visual import legend, overlay

# The shortest side of a tile: below it a tile shows the network too little of the scene.
SMALLEST_TILE = 256


@dataclass
class Report:
    """What `predict` did: images written, pixels per class (int64 num_classes), and what was wrong with others."""

    pixels: np.ndarray
    written: int = 0
    problems: list[str] = field(default_factory=list)


def predict(model: Model, source: str | Path, output: str | Path, *, how: Eval, say: Callable[[str], None]) -> Report:
    """Predict every image of ``source`` into OUTPUT/{overlay,indices,color}/NAME.png, and OUTPUT/legend.png.

    An unreadable image of a folder is said, counted and passed over; a single one raises `OcrnetError`.
    """
    images, output = find(source, output), Path(output)
    if output.exists() and not output.is_dir():
        raise OcrnetError(f"--output '{output}' is a file; give a folder")
    report = Report(np.zeros(model.arch.num_classes, np.int64))
    write_png(output / "legend.png", legend(model.names, model.palette))
    for number, (name, path) in enumerate(images.items(), 1):
        try:
            image = read_image(path, upright=True)
        except OcrnetError as error:
            if len(images) == 1:
                raise
            report.problems.append(str(error))
            say(f"[{number}/{len(images)}] passed over: {error}")
            continue
        labels, tiles = label(model, image, how)
        _write(output, name, image, labels, model)
        report.pixels += np.bincount(labels.reshape(-1), minlength=len(report.pixels))
        report.written += 1
        note = f", in {tiles} tiles" if tiles > 1 else ""
        say(f"[{number}/{len(images)}] {path}: {image.shape[0]}x{image.shape[1]}{note} -> {output}/overlay/{name}.png")
    return report


def find(source: str | Path, output: str | Path) -> dict[str, Path]:
    """Return the image files that a path means, by the name of their results, which is unique; none of ``output``'s."""
    source, results = Path(source), Path(output).resolve()
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise OcrnetError(f"'{source}' does not exist; give an image, or a folder of images")
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    if source.resolve() == results:
        raise OcrnetError(f"--output '{output}' is the folder of the images themselves; give another one")
    paths = [path for path in paths if results not in path.resolve().parents]
    if not paths:
        raise OcrnetError(f"'{source}' holds no images ({' '.join(IMAGES)}); it holds {listing(source)}")
    stems = [path.relative_to(source).with_suffix("").as_posix() for path in paths]
    often = Counter(stems)
    whole = (path.relative_to(source).as_posix() for path in paths)
    names = [name if often[stem] > 1 else stem for stem, name in zip(stems, whole, strict=True)]
    return dict(zip(names, paths, strict=True))


def label(model: Model, image: np.ndarray, how: Eval) -> tuple[np.ndarray, int]:
    """Return class indices uint8 H,W for an image uint8 H,W,3 RGB, and in how many tiles it was looked at.

    Neighbouring tiles overlap by at least a third; a pixel is taken from the tile in which it lies further inside.
    """
    size = image.shape[0], image.shape[1]
    tile = tile_size(model.arch, size, how)
    windows = make_windows(size, tile)
    labels = np.empty(size, np.uint8)
    rows, columns = (cuts((window[axis] for window in windows), tile[axis], size[axis]) for axis in (0, 1))
    for top, left, height, width in windows:
        seen = model.predict(image[top : top + height, left : left + width], how.scales, how.flip, how.slide)
        (first, last), (begin, end) = rows[top], columns[left]
        labels[first:last, begin:end] = seen[first - top : last - top, begin - left : end - left]
    return labels, len(windows)


def tile_size(arch: Arch, size: tuple[int, int], how: Eval) -> tuple[int, int]:
    """Return the whole ``size`` (height, width) where it fits into ``how.max_memory``, else that of a tile."""
    limit = how.max_memory * 2**30
    need = cost.predict_bytes(arch, size, max(how.scales))
    if need <= limit:
        return size
    side = math.isqrt(round(size[0] * size[1] * limit / need)) // 32 * 32
    side = max(SMALLEST_TILE, side)
    return min(size[0], side), min(size[1], side)


def _write(output: Path, name: str, image: np.ndarray, labels: np.ndarray, model: Model) -> None:
    palette = np.array(model.palette, np.uint8)
    write_png(output / "overlay" / f"{name}.png", overlay(image, labels, palette))
    write_png(output / "indices" / f"{name}.png", labels)
    write_png(output / "color" / f"{name}.png", palette[labels])


def text(report: Report, names: tuple[str, ...]) -> str:
    """Return what people read at the end: the share of each class that occurs, largest first."""
    total = max(1, int(report.pixels.sum()))
    order = [i for i in np.argsort(-report.pixels, kind="stable") if report.pixels[i]]
    width = max((len(names[i]) for i in order), default=0)
    return "\n".join(f"  {names[i]:<{width}}  {100 * report.pixels[i] / total:6.2f} % of the pixels" for i in order)
