"""`ocrnet submit`: write a validated zip of predictions for the Cityscapes test server."""

import logging
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ocrnet.cli import flags
from ocrnet.config import Config
from ocrnet.data.datasets import Dataset, cityscapes, open_dataset
from ocrnet.data.image_io import decode_label, encode_png, image_size, replaced, size_in
from ocrnet.data.sampler import prefetch_map
from ocrnet.distributed.launcher import read_world
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.export.open import open_for_inference
from ocrnet.predict.progress import Progress
from ocrnet.utils.errors import OcrnetError, nearest, printable
from ocrnet.utils.log import RESULT
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import Weights

logger = logging.getLogger(__name__)

SPLITS = ("test", "val")
SIZE = (1024, 2048)
# The number of images of each city that the server expects; used if no dataset is configured.
CITIES = {
    "test": {"berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398},
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
}
# The server's evaluation searches all folders of the zip for CITY_SEQUENCE_FRAME*.png.
_RESULT_NAME = re.compile(r"([^_/]+_\d{6}_\d{6})[^/]*\.png")
_SUFFIX = "_labelIds.png"
_IDS = {label.id for label in cityscapes.LABELS if label.id >= 0}
_HIGHEST_TRAIN_ID, _LOWEST_ID = 18, min(cityscapes.classes().ids)
_MAX_NAME_CHARS = 100  # longest part of an entry's name in a message
_MAX_RESULT_BYTES = 64 * 2**20  # of one result; a PNG of labels has about 10,000 bytes


@dataclass
class ZipContents:
    """The contents of a zip: number of images, pixels of each id (int64 256), sizes (height, width), and problems."""

    images: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    sizes: set[tuple[int, int]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Write predictions of a Cityscapes split as a zip for its test server, or validate such a zip."""
    args = flags.parse("submit", argv)
    split = args.options.get("split", "test")
    if split not in SPLITS:
        raise OcrnetError(f"--split is '{split}', but must be test or val{nearest(split, SPLITS)}")
    if "verify" in args.options:
        return _verify(args, split)
    cfg = flags.load_config(args)
    output = Path(flags.required(args, "output"))
    checkpoint_path = flags.required(args, "checkpoint_path")
    if output.suffix != ".zip":
        raise OcrnetError(f"--output is '{output}', but must end in .zip")
    if output.exists():
        raise OcrnetError(f"--output '{output}' exists; remove it, or choose another name")
    if read_world().size > 1:
        raise OcrnetError("submit supports only one process; start it without mpirun, torchrun, msrun or srun")
    dataset = _open(cfg, split)
    opened = open_for_inference(checkpoint_path, cfg, check=_check_classes, users_config=True)
    engine, cfg = opened.engine, opened.cfg
    try:
        logger.info(f"images: {len(dataset)} of Cityscapes {split} at {dataset.root}")
        logger.info(f"scales: {list(cfg.eval.scales)}, flip: {cfg.eval.flip}")
        contents = write(engine, dataset, cfg, output)
    finally:
        engine.close()
    logger.log(RESULT, _format_contents(contents))
    for size in sorted(contents.sizes - {SIZE}):
        logger.info(f"note: images are {size[0]}x{size[1]}; the server accepts only {SIZE[0]}x{SIZE[1]}")
    logger.info(f"wrote {output}, {output.stat().st_size / 2**20:.1f} MiB, and validated it: no problems")
    return 0


def write(engine: Engine, dataset: Dataset, cfg: Config, output: Path) -> ZipContents:
    """Write the labelIds of every image of a split to a zip.

    The zip is written under a temporary name, read back, validated and then renamed. No file remains if this fails.

    Args:
        engine: The engine, with the weights restored.
        dataset: The split.
        cfg: The config, for the evaluation settings and the number of workers.
        output: The path of the zip.

    Returns:
        The contents of the zip as read back.

    Raises:
        OcrnetError: The zip is invalid, or an image or the zip cannot be read or written.
        Stopped: The process received a signal to stop.
    """
    expected = _expected_sizes(dataset)
    with StopRequest(message="stopping; no file is written") as stop, replaced(output) as file:
        with Progress(len(dataset)) as progress, zipfile.ZipFile(file, "w") as archive:
            for index, image in prefetch_map(range(len(dataset)), dataset.image, cfg.num_workers):
                if stop():
                    raise Stopped(stop())
                passes = make_passes(cfg.eval, (image.shape[0], image.shape[1]), cfg.data.base_size)
                labels = engine.predict(image[None], passes)["labels"][0]
                name = dataset.name(index).rpartition("/")[2] + _SUFFIX
                # mutation: submit-label-ids
                archive.writestr(zipfile.ZipInfo(name), encode_png(dataset.classes.to_ids(labels)))
                progress.done()
        file.flush()
        os.fsync(file.fileno())
        contents = inspect(file.name, expected)
        # mutation: validate-written-zip
        if contents.problems:
            raise OcrnetError(
                f"the zip written for {output} is invalid and was removed:\n{_format_problems(contents.problems)}"
            )
    return contents


def _verify(args: flags.Args, split: str) -> int:
    path = args.options["verify"]
    for name in args.options:
        if name not in ("verify", "split", "config"):
            raise OcrnetError(f"--{name} has no effect with --verify, which only validates a zip; omit one of them")
    expected = None
    if "config" in args.options:
        expected = _expected_sizes(_open(flags.load_config(args), split))
    elif args.given:
        raise OcrnetError(f"--set {next(iter(args.given))}: no effect on submit --verify without --config")
    contents = inspect(path, expected, split)
    logger.log(RESULT, _format_contents(contents))
    if contents.problems:
        print(
            f"{printable(path)}: {len(contents.problems)} problems:\n{_format_problems(contents.problems)}",
            file=sys.stderr,
        )
        return 1
    logger.log(RESULT, f"{printable(path)}: no problems")
    return 0


def _open(cfg: Config, split: str) -> Dataset:
    if cfg.data.name != "cityscapes":
        raise OcrnetError(f"data.name is {cfg.data.name}, but submit supports only cityscapes; use a Cityscapes config")
    return open_dataset(cfg.data.name, cfg.data.dataset_dir, split, labels=False, ignore_label=cfg.data.ignore_label)


def _expected_sizes(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Return the size (height, width) of each image by its CITY_SEQUENCE_FRAME, read from the file headers."""
    expected = {}
    for index in range(len(dataset)):
        name = dataset.name(index).rpartition("/")[2]
        if not _RESULT_NAME.fullmatch(name + ".png"):
            raise OcrnetError(
                f"{dataset.path(index)}: the server accepts only names like berlin_000000_000019; rename the image"
            )
        expected[name] = image_size(dataset.path(index))
    return expected


def _check_classes(weights: Weights) -> None:
    names = cityscapes.classes().names
    own_names = weights.meta.get("classes", {}).get("names")
    if weights.arch.num_classes != len(names) or (own_names is not None and tuple(own_names) != names):
        raise OcrnetError(
            f"{weights.path} predicts {weights.arch.num_classes} classes, but must predict the 19 of Cityscapes"
        )


def inspect(
    path: str | Path, expected: Mapping[str, tuple[int, int]] | None = None, split: str = "test"
) -> ZipContents:
    """Read and validate every byte of a zip.

    Args:
        path: The zip.
        expected: The expected size (height, width) of each image by its CITY_SEQUENCE_FRAME. If None, the cities of
            ``split`` with their numbers of images, at `SIZE`, are expected.
        split: The split, test or val; used if ``expected`` is None.

    Returns:
        The contents of the zip and its problems.

    Raises:
        OcrnetError: The file does not exist, is damaged, or is not a zip.
    """
    contents = ZipContents()
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for entry in archive.infolist() if (name := _check_entry(archive, entry, expected, contents))]
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except Exception as error:  # zipfile raises many types, from UnicodeDecodeError to struct.error
        raise OcrnetError(f"{path} is damaged or not a zip ({error})") from None
    num_results = Counter(names)
    contents.problems += [
        f"{name[:_MAX_NAME_CHARS]} has {count} results, expected 1" for name, count in num_results.items() if count > 1
    ]
    contents.problems += _missing_results(num_results, expected, split)
    contents.problems += _unexpected_ids(contents.ids)
    return contents


def _check_entry(
    archive: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    expected: Mapping[str, tuple[int, int]] | None,
    contents: ZipContents,
) -> str | None:
    """Validate one entry of the zip; return the name of its image, or None if the entry is not a prediction."""
    if entry.is_dir():
        return None
    shown_name = printable(entry.filename, _MAX_NAME_CHARS)
    match = _RESULT_NAME.fullmatch(entry.filename.rpartition("/")[2])
    if match is None:
        contents.problems.append(f"{shown_name} is not named like berlin_000000_000019{_SUFFIX}")
        return None
    name = match[1]
    if expected is not None and name not in expected:
        contents.problems.append(f"{shown_name} does not match any image of the split")
        return None
    if entry.file_size > _MAX_RESULT_BYTES:
        contents.problems.append(
            f"{shown_name} decompresses to {entry.file_size:,} bytes; the limit is {_MAX_RESULT_BYTES:,}"
        )
        return name
    size = SIZE if expected is None else expected[name]
    try:
        data = archive.read(entry)
        actual = size_in(data, shown_name)
        if actual != size:  # before decoding: a small file can hold an image that exceeds memory
            contents.problems.append(f"{shown_name} is {actual[0]}x{actual[1]}, not {size[0]}x{size[1]}")
            return name
        ids = decode_label(data, shown_name)
    except OcrnetError as error:
        contents.problems.append(str(error))
        return name
    except Exception as error:  # CRC, password, method, and decompression errors: zlib.error, LZMAError and others
        contents.problems.append(f"{shown_name} is damaged ({error})")
        return name
    contents.images += 1
    contents.sizes.add((ids.shape[0], ids.shape[1]))
    contents.ids += np.bincount(ids.reshape(-1), minlength=256)
    return name


def _missing_results(
    num_results: Mapping[str, int], expected: Mapping[str, object] | None, split: str
) -> Iterator[str]:
    if expected is not None:
        yield from (f"{name} has no result" for name in expected if name not in num_results)
        return
    per_city = Counter(name.partition("_")[0] for name in num_results)
    for city, count in CITIES[split].items():
        if per_city[city] != count:
            yield f"{city} has {per_city[city]} results; the {split} split has {count} images of this city"
    yield from (
        f"{city[:_MAX_NAME_CHARS]} is not a city of the {split} split" for city in per_city if city not in CITIES[split]
    )


def _unexpected_ids(pixels: np.ndarray) -> Iterator[str]:
    present = [int(id_) for id_ in np.flatnonzero(pixels)]
    unknown = [id_ for id_ in present if id_ not in _IDS]
    if unknown:
        yield f"ids that Cityscapes does not define: {', '.join(map(str, unknown))}"
    elif present and present[0] < _LOWEST_ID and present[-1] <= _HIGHEST_TRAIN_ID:
        yield (
            f"all ids are from {present[0]} to {present[-1]} and seem to be class indices (trainIds); the server "
            f"expects labelIds, {_LOWEST_ID} to {max(_IDS)} for the 19 classes"
        )


def _format_contents(contents: ZipContents) -> str:
    total = max(1, int(contents.ids.sum()))
    names = {label.id: label.name for label in cityscapes.LABELS}
    shares = [
        f"  {id_:3} {names.get(int(id_), 'unknown'):<20} {100 * contents.ids[id_] / total:6.2f} % of the pixels"
        for id_ in np.argsort(-contents.ids, kind="stable")
        if contents.ids[id_]
    ]
    return "\n".join([f"{contents.images} results", *shares])


def _format_problems(problems: Sequence[str], limit: int = 20) -> str:
    more = [f"  and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*(f"  {printable(line)}" for line in problems[:limit]), *more])
