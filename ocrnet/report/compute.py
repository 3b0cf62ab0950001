"""Evaluation of the validation images with a run's network; the figures are stored in the run's folder."""

import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet import architecture, config
from ocrnet.config import Config, Eval, loader
from ocrnet.config.loader import SourcedValue
from ocrnet.data.datasets.base import Dataset
from ocrnet.data.sampler import val_stream
from ocrnet.data.visualize import thumbnail
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.evaluation import metrics
from ocrnet.export.open import as_weights, open_engine, read
from ocrnet.report import files, source
from ocrnet.report.figures import Tally, plain, ranked, tolerance
from ocrnet.report.source import Source
from ocrnet.train.setup import open_split
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights, convert

# A changed number causes figures stored by earlier versions to be recomputed.
FORMAT = 1

# SHOWN: number of best and of worst images shown. SAME: number of images shown for every network, so that runs can be
# compared. SIDE: longer side of a stored image, in pixels.
SHOWN = 3
SAME = 2
SIDE = 480

# Approximate maximum number of values in the stored map of each pixel's relation to the regions.
RELATIONS = 200_000

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Figures:
    """The figures of a run: ``facts`` are strict JSON, ``arrays`` hold the images that the page shows."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def scores(self) -> metrics.Scores:
        """The scores of the confusion matrix, computed as in `ocrnet eval`."""
        confusion = np.array(self.facts["confusion"], np.int64)
        return metrics.scores(confusion, self.facts["names"], self.facts["categories"])


@dataclass(frozen=True)
class ReportFilter:
    """Config values, checkpoint and number of images from the command line; ``images`` 0 means all."""

    given: Mapping[str, SourcedValue] = dataclasses.field(default_factory=dict)
    checkpoint: Path | None = None
    images: int = 0


def figures(run: Source, report_filter: ReportFilter, say: Say) -> Figures:
    """Return the figures of a run's best checkpoint, computed or as stored by an earlier report.

    Labels equal those of `ocrnet eval` for the same config.

    Args:
        run: The run.
        report_filter: Config values, the number of images, and a checkpoint to use instead of the best one.
        say: Logs a line of progress.

    Returns:
        The figures, which are also stored in the run's folder.

    Raises:
        OcrnetError: There is no checkpoint, the images are unavailable and no figures are stored, or the dataset does
            not fit the network.
    """
    path = report_filter.checkpoint or source.best_checkpoint(run)
    if path is None:
        raise OcrnetError(f"'{run.folder}' has no checkpoint to evaluate; give one with --checkpoint_path")
    given = read(path, Config())
    found = as_weights(given)
    flat = run.config or dict(_flat(found))
    cfg = source.config_for(flat, report_filter.given, str(run.folder / "config.yml" if run.config else path))
    cfg, _ = convert.with_normalization(cfg, found)
    key = {
        "format": FORMAT,
        "checkpoint": _identity(found),
        "eval": [list(cfg.eval.scales), cfg.eval.flip, cfg.eval.slide and list(cfg.eval.slide)],
        "base_size": cfg.data.base_size and list(cfg.data.base_size),
        "ignore_label": cfg.data.ignore_label,
        "mix": cfg.mix,
        "images": report_filter.images,
    }
    kept = _kept(run, key)
    try:
        dataset = open_split(cfg, "val")
    except OcrnetError as error:
        if kept is None:
            raise OcrnetError(f"{error}\nor make the report without images: --curves_only True") from None
        say("the validation images are missing: using the figures stored in the run's folder")
        return kept
    if kept and kept.facts["identity"] == dataset.identity:
        say(f"{path.name} is already evaluated: using the figures stored in the run's folder")
        return kept
    if found.arch.num_classes != len(dataset.classes):
        raise OcrnetError(
            f"{path} predicts {found.arch.num_classes} classes, but {cfg.data.name} at {cfg.data.dataset_dir} has "
            f"{len(dataset.classes)}; give the dataset it was trained on with --set data.dataset_dir=FOLDER"
        )
    engine = open_engine(cfg, given, world=World())
    try:
        engine.restore(found.tensors, found.meta.get("step", 0))
        say(f"evaluating {report_filter.images or len(dataset)} of {len(dataset)} validation images with {path.name}")
        made = look(engine, cfg, dataset, report_filter.images, say)
    finally:
        engine.close()
    made.facts.update(
        key=key,
        identity=dataset.identity,
        checkpoint=path.name,
        step=found.meta.get("step", 0),
        arch=_arch(found),
        parameters=architecture.num_parameters(found.arch),
        eval={"scales": list(cfg.eval.scales), "flip": cfg.eval.flip, "slide": cfg.eval.slide and list(cfg.eval.slide)},
        decisions=list(engine.startup_messages),
        versions=dict(engine.versions),
    )
    _keep(run, made, say)
    return made


def look(engine: Engine, cfg: Config, dataset: Dataset, images: int, say: Say) -> Figures:
    """Compute the figures over the images, then predict the images that are shown once more.

    Args:
        engine: The engine, with the weights restored.
        cfg: The config of the evaluation.
        dataset: The validation split.
        images: The number of images, evenly spaced over the split; 0 means all.
        say: Logs a line of progress.

    Returns:
        The figures, without the facts about run and checkpoint.

    Raises:
        OcrnetError: No pixel of the images is labeled.
    """
    count = min(images or len(dataset), len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    part = Dataset(dataset.classes, [dataset.pairs[i] for i in chosen], dataset.root)
    tally, reach = Tally(len(dataset.classes)), set()
    begun = said = time.monotonic()
    for index, image, truth in val_stream(part, World(), cfg.num_workers):
        passes = make_passes(cfg.eval, (truth.shape[0], truth.shape[1]), cfg.data.base_size)
        answer = engine.predict(image[None], passes, ("labels", "confidence"))
        tally.add(part.name(index), answer["labels"][0], answer["confidence"][0], truth)
        reach.add(tolerance(*truth.shape))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"evaluated {index + 1}/{count} images, {(index + 1) / (said - begun):.2f} img/s")
    if not tally.confusion.any():
        raise OcrnetError(f"no pixel of the validation images at {dataset.root} is labeled; see ocrnet check")
    order = ranked(tally.images)
    shown = [("best", i) for i in reversed(order[-SHOWN:])]
    shown += [("worst", i) for i in order[:SHOWN] if i not in order[-SHOWN:]]
    shown += [("same", (2 * k + 1) * count // (2 * SAME)) for k in range(min(SAME, count))]
    arrays: dict[str, np.ndarray] = {}
    samples = []
    for place, (why, index) in enumerate(shown):
        image, truth = part.read(index)
        labels = engine.predict(
            image[None], make_passes(cfg.eval, (truth.shape[0], truth.shape[1]), cfg.data.base_size)
        )["labels"][0]
        for name, array in (("image", image), ("truth", truth), ("prediction", labels)):
            arrays[f"{place}_{name}"] = thumbnail(array, SIDE)
        samples.append({"why": why, **tally.images[index]})
    classes = dataset.classes
    facts: dict[str, Any] = {
        "dataset": cfg.data.name,
        "images": count,
        "of": len(dataset),
        "names": list(classes.names),
        "palette": [list(color) for color in classes.palette],
        "categories": list(classes.categories),
        "confusion": tally.confusion.tolist(),
        "boundary": [plain(value) for value in tally.boundary.tolist()],
        "tolerance": sorted(reach),
        "calibration": {
            "pixels": tally.calibration.pixels.tolist(),
            "accuracy": [plain(value) for value in tally.calibration.accuracy.tolist()],
            "confidence": [plain(value) for value in tally.calibration.confidence.tolist()],
            "error": plain(tally.calibration.error),
        },
        "per_image": tally.images,
        "samples": samples,
    }
    richest = max(order, key=lambda i: (tally.images[i]["classes"], tally.images[i]["mean_iou"]))
    facts["ocr"] = _what_ocr_saw(engine, part, richest, arrays, say)
    return Figures(facts, arrays)


def _what_ocr_saw(
    engine: Engine, dataset: Dataset, index: int, arrays: dict[str, np.ndarray], say: Say
) -> dict[str, Any] | None:
    """Store an image, its soft object regions and each pixel's relation to them in ``arrays``; return its facts.

    Return None if the engine does not provide regions and relation.
    """
    image = dataset.image(index)
    passes = make_passes(Eval(), (image.shape[0], image.shape[1]))
    try:
        answer = engine.predict(image[None], passes, ("labels", "regions", "relation"))
    except OcrnetError as error:
        say(f"the object regions are omitted: {error}")
        return None
    regions, relation = answer["regions"][0], answer["relation"][0]  # float32 num_classes,h,w
    highest = regions.max(axis=(1, 2), keepdims=True)
    spread = np.round(np.sqrt(regions / np.maximum(highest, 1e-30)) * 255).astype(np.uint8)
    arrays["ocr_image"], arrays["ocr_labels"] = thumbnail(image, SIDE), thumbnail(answer["labels"][0], SIDE)
    arrays["ocr_regions"] = np.stack([thumbnail(region, SIDE // 2) for region in spread])
    step = math.ceil(math.sqrt(relation.size / RELATIONS))
    arrays["ocr_relation"] = np.round(relation[:, step // 2 :: step, step // 2 :: step] * 255).astype(np.uint8)
    return {"name": dataset.name(index), "own": _on_own(regions, answer["labels"][0])}


def _on_own(regions: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return, for each class, the part of its region's weight that lies on pixels predicted as this class."""
    small = labels[::4, ::4]
    return [float(region[small == index].sum()) for index, region in enumerate(regions)]


def _identity(found: Weights) -> str:
    return found.meta.get("sha256") or f"{found.path.name} {found.path.stat().st_size} {found.path.stat().st_mtime_ns}"


def _arch(found: Weights) -> dict[str, Any]:
    arch = found.arch
    names = ("width", "blocks", "modules", "channels", "key_channels", "variant")
    return {name: getattr(arch, name) if name != "modules" else list(arch.modules) for name in names}


def _flat(found: Weights) -> dict[str, Any]:
    return loader.with_current_keys(dict(config.flat(found.meta.get("config", {}))))


def _kept(run: Source, key: dict[str, Any]) -> Figures | None:
    """Return the figures of an earlier report if they are readable and have the same ``key``, else None."""
    folder = run.folder / "report"
    try:
        facts = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        if facts["key"] != key:
            return None
        with np.load(folder / "figures.npz", allow_pickle=False) as file:
            if file["stamp"].item() != facts["stamp"]:
                return None
            return Figures(facts, {name: file[name] for name in file.files})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(run: Source, made: Figures, say: Say) -> None:
    """Store the figures in the run's folder; a failed write is only logged, and the next report recomputes them."""
    stamp = time.time_ns()  # equal in both files if they belong together
    packed = io.BytesIO()
    np.savez_compressed(packed, stamp=np.int64(stamp), **made.arrays)
    text = json.dumps(made.facts | {"stamp": stamp}, allow_nan=False)
    try:
        files.write(run.folder / "report" / "figures.npz", packed.getvalue())
        files.write(run.folder / "report" / "figures.json", text.encode())
    except OcrnetError as error:
        say(f"the figures are not stored for the next report: {error}")
