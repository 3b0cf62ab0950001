"""Evaluation of a run's network on the validation images; the results are stored in the folder of the run."""

import dataclasses
import io
import json
import logging
import math
import time
from collections.abc import Mapping
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

logger = logging.getLogger(__name__)

# Version of the stored figures; figures of another version are computed again.
FORMAT = 1

# NUM_RANKED: number of best images shown, and of worst images. NUM_SHARED: number of images shown for every run, for
# comparison. SIDE: longer side of a stored image, in pixels.
NUM_RANKED = 3
NUM_SHARED = 2
SIDE = 480

# Approximate maximum number of values in the stored relation of pixels to regions.
MAX_RELATION_VALUES = 200_000


@dataclass(frozen=True, eq=False)
class Figures:
    """The results of evaluating a run: numbers in ``facts`` (strict JSON), images of the page in ``arrays``."""

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


def figures(run: Source, report_filter: ReportFilter) -> Figures:
    """Return the figures of a run's best checkpoint: those stored by an earlier report if they apply, else new ones.

    The predicted labels are those of `ocrnet eval` with the same config.

    Args:
        run: The run.
        report_filter: Config values, the number of images, and a checkpoint to use instead of the best one.

    Returns:
        The figures; they are stored in the folder of the run.

    Raises:
        OcrnetError: There is no checkpoint, the dataset has other classes than the network, or the images are missing
            and no figures are stored.
    """
    path = report_filter.checkpoint or source.best_checkpoint(run)
    if path is None:
        raise OcrnetError(f"'{run.folder}' has no checkpoint to evaluate; set --checkpoint_path")
    source_file = read(path, Config())
    weights = as_weights(source_file)
    flat = run.config or dict(_flat(weights))
    cfg = source.config_for(flat, report_filter.given, str(run.folder / "config.yml" if run.config else path))
    cfg = convert.with_normalization(cfg, weights)
    key = {
        "format": FORMAT,
        "checkpoint": _identity(weights),
        "eval": [list(cfg.eval.scales), cfg.eval.flip, cfg.eval.slide and list(cfg.eval.slide)],
        "base_size": cfg.data.base_size and list(cfg.data.base_size),
        "ignore_label": cfg.data.ignore_label,
        "mix": cfg.mix,
        "images": report_filter.images,
    }
    stored = _load_stored(run, key)
    try:
        dataset = open_split(cfg, "val")
    except OcrnetError as error:
        if stored is None:
            raise OcrnetError(f"{error}\nor write the report without an evaluation: --curves_only True") from None
        logger.info("the validation images are missing; using the figures stored in the run's folder")
        return stored
    if stored and stored.facts["identity"] == dataset.identity:
        logger.info(f"{path.name} is already evaluated; using the figures stored in the run's folder")
        return stored
    if weights.arch.num_classes != len(dataset.classes):
        raise OcrnetError(
            f"{path} predicts {weights.arch.num_classes} classes, but {cfg.data.name} at {cfg.data.dataset_dir} has "
            f"{len(dataset.classes)}; set the dataset on which it was trained with --set data.dataset_dir=FOLDER"
        )
    engine = open_engine(cfg, source_file, world=World())
    try:
        engine.restore(weights.tensors, weights.meta.get("step", 0))
        logger.info(
            f"evaluating {report_filter.images or len(dataset)} of {len(dataset)} validation images with {path.name}"
        )
        result = compute_figures(engine, cfg, dataset, report_filter.images)
    finally:
        engine.close()
    result.facts.update(
        key=key,
        identity=dataset.identity,
        checkpoint=path.name,
        step=weights.meta.get("step", 0),
        arch=_arch(weights),
        parameters=architecture.num_parameters(weights.arch),
        eval={"scales": list(cfg.eval.scales), "flip": cfg.eval.flip, "slide": cfg.eval.slide and list(cfg.eval.slide)},
        decisions=list(engine.startup_messages),
        versions=dict(engine.versions),
    )
    _store(run, result)
    return result


def compute_figures(engine: Engine, cfg: Config, dataset: Dataset, images: int) -> Figures:
    """Evaluate the images and return their figures; the images to show are predicted a second time.

    Args:
        engine: The engine, with the weights restored.
        cfg: The config of the evaluation.
        dataset: The validation split.
        images: The number of images, evenly spaced over the split; 0 means all.

    Returns:
        The figures, without the entries about run and checkpoint.

    Raises:
        OcrnetError: No pixel of the images is labeled.
    """
    count = min(images or len(dataset), len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    part = Dataset(dataset.classes, [dataset.pairs[i] for i in chosen], dataset.root)
    tally, tolerances = Tally(len(dataset.classes)), set()
    start = last_logged = time.monotonic()
    for index, image, ground_truth in val_stream(part, World(), cfg.num_workers):
        passes = make_passes(cfg.eval, (ground_truth.shape[0], ground_truth.shape[1]), cfg.data.base_size)
        outputs = engine.predict(image[None], passes, ("labels", "confidence"))
        tally.add(part.name(index), outputs["labels"][0], outputs["confidence"][0], ground_truth)
        tolerances.add(tolerance(*ground_truth.shape))
        if time.monotonic() - last_logged > 10:
            last_logged = time.monotonic()
            logger.info(f"evaluated {index + 1}/{count} images, {(index + 1) / (last_logged - start):.2f} img/s")
    if not tally.confusion.any():
        raise OcrnetError(f"no pixel of the validation images at {dataset.root} is labeled; see ocrnet check")
    order = ranked(tally.images)
    shown = [("best", i) for i in reversed(order[-NUM_RANKED:])]
    shown += [("worst", i) for i in order[:NUM_RANKED] if i not in order[-NUM_RANKED:]]
    shown += [("same", (2 * k + 1) * count // (2 * NUM_SHARED)) for k in range(min(NUM_SHARED, count))]
    arrays: dict[str, np.ndarray] = {}
    samples = []
    for position, (group, index) in enumerate(shown):
        image, ground_truth = part.read(index)
        labels = engine.predict(
            image[None], make_passes(cfg.eval, (ground_truth.shape[0], ground_truth.shape[1]), cfg.data.base_size)
        )["labels"][0]
        arrays[f"{position}_image"] = thumbnail(image, SIDE)
        arrays[f"{position}_truth"] = thumbnail(ground_truth, SIDE)
        arrays[f"{position}_prediction"] = thumbnail(labels, SIDE)
        samples.append({"why": group, **tally.images[index]})
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
        "tolerance": sorted(tolerances),
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
    facts["ocr"] = _ocr_facts(engine, part, richest, arrays)
    return Figures(facts, arrays)


def _ocr_facts(engine: Engine, dataset: Dataset, index: int, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Store an image, its soft object regions, and the relation of its pixels to them in ``arrays``.

    Args:
        engine: The engine, with the weights restored.
        dataset: The evaluated images.
        index: The index of the image.
        arrays: The arrays of the figures, to which entries are added.

    Returns:
        The name of the image, and the part of each region on its own class; None if the engine has no regions.
    """
    image = dataset.image(index)
    passes = make_passes(Eval(), (image.shape[0], image.shape[1]))
    try:
        outputs = engine.predict(image[None], passes, ("labels", "regions", "relation"))
    except OcrnetError as error:
        logger.info(f"the object regions are omitted: {error}")
        return None
    regions, relation = outputs["regions"][0], outputs["relation"][0]  # float32 num_classes,h,w
    highest = regions.max(axis=(1, 2), keepdims=True)
    spread = np.round(np.sqrt(regions / np.maximum(highest, 1e-30)) * 255).astype(np.uint8)
    arrays["ocr_image"], arrays["ocr_labels"] = thumbnail(image, SIDE), thumbnail(outputs["labels"][0], SIDE)
    arrays["ocr_regions"] = np.stack([thumbnail(region, SIDE // 2) for region in spread])
    step = math.ceil(math.sqrt(relation.size / MAX_RELATION_VALUES))
    arrays["ocr_relation"] = np.round(relation[:, step // 2 :: step, step // 2 :: step] * 255).astype(np.uint8)
    return {"name": dataset.name(index), "own": _own_weight(regions, outputs["labels"][0])}


def _own_weight(regions: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return, for each class, the part of its region's weight on pixels that are predicted as this class."""
    small = labels[::4, ::4]
    return [float(region[small == index].sum()) for index, region in enumerate(regions)]


def _identity(weights: Weights) -> str:
    return (
        weights.meta.get("sha256")
        or f"{weights.path.name} {weights.path.stat().st_size} {weights.path.stat().st_mtime_ns}"
    )


def _arch(weights: Weights) -> dict[str, Any]:
    arch = weights.arch
    names = ("width", "blocks", "modules", "channels", "key_channels", "variant")
    return {name: getattr(arch, name) if name != "modules" else list(arch.modules) for name in names}


def _flat(weights: Weights) -> dict[str, Any]:
    return loader.with_current_keys(dict(config.flat(weights.meta.get("config", {}))))


def _load_stored(run: Source, key: dict[str, Any]) -> Figures | None:
    """Return the stored figures of an earlier report if they are readable and have the same ``key``, else None."""
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


def _store(run: Source, result: Figures) -> None:
    """Store the figures in the folder of the run for later reports; a failed write is only logged."""
    stamp = time.time_ns()  # the same in both files, which shows that they belong together
    packed = io.BytesIO()
    np.savez_compressed(packed, stamp=np.int64(stamp), **result.arrays)
    text = json.dumps(result.facts | {"stamp": stamp}, allow_nan=False)
    try:
        files.write(run.folder / "report" / "figures.npz", packed.getvalue())
        files.write(run.folder / "report" / "figures.json", text.encode())
    except OcrnetError as error:
        logger.info(f"cannot store the figures, so the next report computes them again: {error}")
