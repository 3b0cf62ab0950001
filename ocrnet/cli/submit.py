"""`ocrnet submit`: write a complete, validated zip for the Cityscapes test server, or write none."""

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
from ocrnet.distributed.launcher import World, read_world
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.export.open import as_weights, open_engine, read
from ocrnet.predict.progress import Progress
from ocrnet.train.setup import differences
from ocrnet.utils.errors import OcrnetError, nearest, printable
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import Weights, checkpoint, convert

SPLITS = ("test", "val")
SIZE = (1024, 2048)
# The number of images of each city that the server expects, used if the dataset is not available.
CITIES = {
    "test": {"berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398},
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
}
# The server's evaluation searches all folders for CITY_SEQUENCE_FRAME*.png.
_RESULT = re.compile(r"([^_/]+_\d{6}_\d{6})[^/]*\.png")
_END = "_labelIds.png"
_IDS = {label.id for label in cityscapes.LABELS if label.id >= 0}
_HIGHEST_TRAIN_ID, _LOWEST_ID = 18, min(cityscapes.classes().ids)
_LONGEST = 100  # characters of an entry's name that are shown
_LARGEST = 64 * 2**20  # bytes of one result; a PNG of labels has about ten thousand


@dataclass
class Checked:
    """The contents of a zip: images, pixels of each id (int64 256), image sizes (height, width), and problems."""

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
        return _look_through(args, split)
    cfg, notes = flags.load_config(args)
    output = Path(flags.required(args, "output"))
    given_path = flags.required(args, "checkpoint_path")
    if output.suffix != ".zip":
        raise OcrnetError(f"--output is '{output}', but must end in .zip")
    if output.exists():
        raise OcrnetError(f"--output '{output}' exists; remove it, or give another name")
    if read_world().size > 1:
        raise OcrnetError("submit runs as one process; start it without mpirun, torchrun, msrun or srun")
    path, meaning = checkpoint.resolve(given_path)
    dataset = _open(cfg, split)
    given = read(path, cfg)
    found = as_weights(given)
    _check_classes(found, path)
    cfg, said = convert.with_normalization(cfg, found)
    engine = open_engine(cfg, given, world=World())
    try:
        engine.restore(found.tensors, 0)
        lines = [*engine.startup_messages, *notes, *([meaning] if meaning else []), *found.notes]
        lines += [*differences(cfg, found.arch, path), *said, f"checkpoint: {path}"]
        lines.append(f"images: {len(dataset)} of Cityscapes {split} at {dataset.root}")
        lines.append(f"scales: {list(cfg.eval.scales)}, flip: {cfg.eval.flip}")
        for line in lines:
            _say(line)
        checked = write(engine, dataset, cfg, output)
    finally:
        engine.close()
    _say(_text(checked))
    for size in sorted(checked.sizes - {SIZE}):
        _say(f"note: images are {size[0]}x{size[1]}; the server accepts only {SIZE[0]}x{SIZE[1]}")
    _say(f"wrote {output}, {output.stat().st_size / 2**20:.1f} MiB, and validated it: no problems")
    return 0


def write(engine: Engine, dataset: Dataset, cfg: Config, output: Path) -> Checked:
    """Write the labelIds of every image of a split to a zip.

    The zip gets its final name after it was read back and validated. An exception leaves no file.

    Args:
        engine: The engine, with the weights restored.
        dataset: The split.
        cfg: The config, for the evaluation settings and the number of workers.
        output: The path of the zip.

    Returns:
        The contents of the zip as read back.

    Raises:
        OcrnetError: The zip is invalid, or an image or the zip cannot be read or written.
        Stopped: A signal asked to stop.
    """
    wanted = _wanted(dataset)
    with StopRequest(message="stopping; no file is written") as stop, replaced(output) as file:
        with Progress(len(dataset), _say) as progress, zipfile.ZipFile(file, "w") as archive:
            for index, image in prefetch_map(range(len(dataset)), dataset.image, cfg.num_workers):
                if stop():
                    raise Stopped(stop())
                passes = make_passes(cfg.eval, (image.shape[0], image.shape[1]), cfg.data.base_size)
                labels = engine.predict(image[None], passes)["labels"][0]
                name = dataset.name(index).rpartition("/")[2] + _END
                # mutation: submit-label-ids
                archive.writestr(zipfile.ZipInfo(name), encode_png(dataset.classes.to_ids(labels)))
                progress.done()
        file.flush()
        os.fsync(file.fileno())
        checked = inspect(file.name, wanted)
        # mutation: validate-written-zip
        if checked.problems:
            raise OcrnetError(f"the zip written for {output} is invalid and was removed:\n{_listed(checked.problems)}")
    return checked


def _say(line: str) -> None:
    print(printable(line, lines=True), flush=True)


def _look_through(args: flags.Args, split: str) -> int:
    path = args.options["verify"]
    for name in args.options:
        if name not in ("verify", "split", "config"):
            raise OcrnetError(f"--{name} has no effect with --verify, which validates a zip; leave one of them out")
    wanted = None
    if "config" in args.options:
        wanted = _wanted(_open(flags.load_config(args)[0], split))
    elif args.given:
        raise OcrnetError(f"--set {next(iter(args.given))}: no effect on submit --verify without --config")
    checked = inspect(path, wanted, split)
    _say(_text(checked))
    if checked.problems:
        print(f"{printable(path)}: {len(checked.problems)} problems:\n{_listed(checked.problems)}", file=sys.stderr)
        return 1
    _say(f"{printable(path)}: no problems")
    return 0


def _open(cfg: Config, split: str) -> Dataset:
    if cfg.data.name != "cityscapes":
        raise OcrnetError(f"data.name is {cfg.data.name}, but submit supports only cityscapes; give its config")
    return open_dataset(cfg.data.name, cfg.data.dataset_dir, split, labels=False, ignore_label=cfg.data.ignore_label)


def _wanted(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Return the size (height, width) of each image by its CITY_SEQUENCE_FRAME, read from the file headers."""
    wanted = {}
    for index in range(len(dataset)):
        name = dataset.name(index).rpartition("/")[2]
        if not _RESULT.fullmatch(name + ".png"):
            raise OcrnetError(
                f"{dataset.path(index)}: rename it; the server accepts only names like berlin_000000_000019"
            )
        wanted[name] = image_size(dataset.path(index))
    return wanted


def _check_classes(found: Weights, path: Path) -> None:
    names = cityscapes.classes().names
    has = found.meta.get("classes", {}).get("names")
    if found.arch.num_classes != len(names) or (has is not None and tuple(has) != names):
        raise OcrnetError(f"{path} predicts {found.arch.num_classes} classes, but must predict the 19 of Cityscapes")


def inspect(path: str | Path, wanted: Mapping[str, tuple[int, int]] | None = None, split: str = "test") -> Checked:
    """Read and validate every byte of a zip.

    Args:
        path: The zip.
        wanted: The expected size (height, width) of each image by its CITY_SEQUENCE_FRAME. If None, the cities of
            ``split`` with their numbers of images, at `SIZE`, are expected.
        split: The split, test or val; used if ``wanted`` is None.

    Returns:
        The contents of the zip and its problems.

    Raises:
        OcrnetError: The file does not exist, is damaged, or is not a zip.
    """
    checked = Checked()
    try:
        with zipfile.ZipFile(path) as archive:
            seen = [name for entry in archive.infolist() if (name := _entry(archive, entry, wanted, checked))]
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except Exception as error:  # zipfile passes on all errors of its parts, from UnicodeDecodeError to struct.error
        raise OcrnetError(f"{path} is damaged or not a zip ({error})") from None
    often = Counter(seen)
    checked.problems += [
        f"{name[:_LONGEST]} has {count} results, expected 1" for name, count in often.items() if count > 1
    ]
    checked.problems += _missing(often, wanted, split)
    checked.problems += _odd_ids(checked.ids)
    return checked


def _entry(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, wanted: Mapping[str, tuple[int, int]] | None, checked: Checked
) -> str | None:
    """Validate one entry of the zip; return the name of its image, or None if the entry is not a prediction."""
    if entry.is_dir():
        return None
    shown = printable(entry.filename, _LONGEST)
    named = _RESULT.fullmatch(entry.filename.rpartition("/")[2])
    if named is None:
        checked.problems.append(f"{shown} is not named like berlin_000000_000019{_END}")
        return None
    name = named[1]
    if wanted is not None and name not in wanted:
        checked.problems.append(f"{shown} does not match any image of the split")
        return None
    if entry.file_size > _LARGEST:
        checked.problems.append(f"{shown} decompresses to {entry.file_size:,} bytes; the limit is {_LARGEST:,}")
        return name
    size = SIZE if wanted is None else wanted[name]
    try:
        data = archive.read(entry)
        has = size_in(data, shown)
        if has != size:  # not decoded: a small file can hold an image too large for memory
            checked.problems.append(f"{shown} is {has[0]}x{has[1]}, not {size[0]}x{size[1]}")
            return name
        ids = decode_label(data, shown)
    except OcrnetError as error:
        checked.problems.append(str(error))
        return name
    except Exception as error:  # CRC, password, method, and decompression errors: zlib.error, LZMAError and others
        checked.problems.append(f"{shown} is damaged ({error})")
        return name
    checked.images += 1
    checked.sizes.add((ids.shape[0], ids.shape[1]))
    checked.ids += np.bincount(ids.reshape(-1), minlength=256)
    return name


def _missing(seen: Mapping[str, int], wanted: Mapping[str, object] | None, split: str) -> Iterator[str]:
    if wanted is not None:
        yield from (f"{name} has no result" for name in wanted if name not in seen)
        return
    there = Counter(name.partition("_")[0] for name in seen)
    for city, count in CITIES[split].items():
        if there[city] != count:
            yield f"{city} has {there[city]} results; the {split} split has {count} images of this city"
    yield from (f"{city[:_LONGEST]} is not a city of the {split} split" for city in there if city not in CITIES[split])


def _odd_ids(pixels: np.ndarray) -> Iterator[str]:
    found = [int(id_) for id_ in np.flatnonzero(pixels)]
    unknown = [id_ for id_ in found if id_ not in _IDS]
    if unknown:
        yield f"ids that Cityscapes does not define: {', '.join(map(str, unknown))}"
    elif found and found[0] < _LOWEST_ID and found[-1] <= _HIGHEST_TRAIN_ID:
        yield (
            f"all ids are from {found[0]} to {found[-1]} and look like class indices (trainIds); the server expects "
            f"labelIds, {_LOWEST_ID} to {max(_IDS)} for the 19 classes"
        )


def _text(checked: Checked) -> str:
    total = max(1, int(checked.ids.sum()))
    names = {label.id: label.name for label in cityscapes.LABELS}
    shares = [
        f"  {id_:3} {names.get(int(id_), 'unknown'):<20} {100 * checked.ids[id_] / total:6.2f} % of the pixels"
        for id_ in np.argsort(-checked.ids, kind="stable")
        if checked.ids[id_]
    ]
    return "\n".join([f"{checked.images} results", *shares])


def _listed(problems: Sequence[str], most: int = 20) -> str:
    more = [f"  and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([*(f"  {printable(line)}" for line in problems[:most]), *more])
