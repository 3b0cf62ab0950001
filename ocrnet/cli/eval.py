"""`ocrnet eval`: evaluate a checkpoint on the validation split."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ocrnet import config, weights
from ocrnet.cli import flags
from ocrnet.cli.common import world_of_launcher
from ocrnet.cloud import pull
from ocrnet.cloud import resume as cloud_resume
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.push import RESULTS, UploadContext, Uploader, check_writable
from ocrnet.config import Config
from ocrnet.data.datasets import Dataset, cache
from ocrnet.data.image_io import write_png
from ocrnet.data.visualize import side_by_side
from ocrnet.engines import collectives
from ocrnet.evaluation.evaluator import evaluate
from ocrnet.evaluation.metrics import Scores, as_dict, constant_prediction, table
from ocrnet.export.open import open_for_inference
from ocrnet.tracking.run_dir import Run, core_versions
from ocrnet.train.setup import VAL, identities, open_split
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.log import RESULT
from ocrnet.weights import Weights, checkpoint

logger = logging.getLogger(__name__)

PUSHED_BY_EVAL = (*RESULTS, "visualize/*")


def main(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint on the validation split; the checkpoint determines the architecture."""
    args = flags.parse("eval", argv)
    world = world_of_launcher()
    cfg = flags.load_config(args)
    show = flags.as_bool(args, "visualize")
    checkpoint_path = checkpoint.resolve(_checkpoint_path(args, cfg))  # a wrong path is an error before the download
    cfg = pull.download_dataset(cfg)
    dataset = open_split(cfg, "val")

    def check_classes(weights: Weights) -> None:
        if weights.arch.num_classes != len(dataset.classes):
            raise OcrnetError(
                f"{weights.path} predicts {weights.arch.num_classes} classes, but {cfg.data.name} at "
                f"{cfg.data.dataset_dir} has {len(dataset.classes)}; use the dataset on which it was trained"
            )

    datasets = cache.prepare(cfg.data.cache_dir, {VAL: dataset})
    store = open_store(urls.parse("train_url", cfg.train_url), cfg.cloud) if cfg.train_url else None
    with UploadContext(cfg.cloud) as pushing:
        opened = open_for_inference(checkpoint_path, cfg, world=world, check=check_classes, users_config=True)
        engine, cfg, step = opened.engine, opened.cfg, opened.weights.meta.get("step", 0)
        try:
            if world.size > 1:
                shared = {"checkpoint": weights.identity(opened.weights), **config.of_all_ranks(cfg)}
                collectives.check_same(engine, shared | identities(datasets))
            with collectives.propagate_errors(engine):
                run = Run(cfg.save_dir, rank=world.rank, name="eval")
                run.open_log()
                if store is not None and run.writes:
                    check_writable(store, cfg.cloud)
                    cloud_resume.merge_remote_results(cfg, store)
                    pushing.start(Uploader(store, run.folder, cfg.cloud, keep=0, patterns=PUSHED_BY_EVAL))
                _log_run(cfg, dataset)
                show_image = _make_visualizer(dataset, run.folder / "visualize") if show else None
            scores = evaluate(engine, datasets[VAL], cfg, eval_cfg=cfg.eval, show=show_image)
        finally:
            engine.close()
        eval_settings = {"scales": list(cfg.eval.scales), "flip": cfg.eval.flip, "slide": cfg.eval.slide}
        row = {"kind": "eval", "step": step, "checkpoint": str(opened.path), **eval_settings, **as_dict(scores)}
        run.record(row | {"versions": core_versions() | dict(engine.versions)})
        return _check_min_miou(cfg, scores, dataset)


def _checkpoint_path(args: flags.Args, cfg: Config) -> str | Path:
    path = args.options.get("checkpoint_path")
    if path is not None and cfg.ckpt_url:
        raise OcrnetError(f"--checkpoint_path {path} and ckpt_url {cfg.ckpt_url} both name a checkpoint; keep one")
    return pull.download_weights(cfg) or flags.required(args, "checkpoint_path")


def _check_min_miou(cfg: Config, scores: Scores, dataset: Dataset) -> int:
    """Log the scores; return the exit status: 1 if mIoU is less than `min_miou` or is not a number, else 0."""
    logger.log(RESULT, table(scores))
    index, mean_iou = constant_prediction(scores)
    logger.log(RESULT, f"baseline: always predicting '{dataset.classes.names[index]}' has mIoU {100 * mean_iou:.2f}")
    if cfg.min_miou is None:
        return 0
    verdict = "reached" if scores.mean_iou >= cfg.min_miou else "NOT reached"
    logger.log(RESULT, f"min_miou: mIoU of at least {100 * cfg.min_miou:.2f}: {verdict}")
    return int(not scores.mean_iou >= cfg.min_miou)


def _log_run(cfg: Config, dataset: Dataset) -> None:
    windows = "whole image" if cfg.eval.slide is None else "windows of {}x{}".format(*cfg.eval.slide)
    logger.info(f"images: {len(dataset)} of {cfg.data.name} val at {cfg.data.dataset_dir}")
    logger.info(f"scales: {list(cfg.eval.scales)}, flip: {cfg.eval.flip}, {windows}")


def _make_visualizer(dataset: Dataset, folder: Path) -> Callable:
    folder.mkdir(parents=True, exist_ok=True)

    def show(index: int, image, prediction, ground_truth) -> None:  # type: ignore[no-untyped-def]
        classes = dataset.classes
        panel = side_by_side(image, prediction, ground_truth, palette=classes.palette, names=classes.names)
        write_png(folder / f"{dataset.name(index).replace('/', '_')}.png", panel)

    return show
