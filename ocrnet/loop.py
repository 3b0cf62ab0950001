"""The one training loop: a segment of steps, then log, evaluate, save, each when due."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ocrnet import checkpoint, config, schedule
from ocrnet.config import Config, Eval
from ocrnet.datasets.base import Dataset
from ocrnet.engine import Engine, Stats
from ocrnet.errors import OcrnetError
from ocrnet.evaluate import evaluate
from ocrnet.metrics import Scores, as_dict
from ocrnet.run import Run, core_versions
from ocrnet.stream import TrainStream, numbers
from ocrnet.world import World


@dataclass
class Progress:
    """All of the loop's own state: what a checkpoint holds beside the engine's."""

    step: int = 0
    best_step: int | None = None
    best_mean_iou: float | None = None
    skipped: int = 0
    skipped_in_row: int = 0


def fit(
    cfg: Config, engine: Engine, run: Run, *, stream: TrainStream, val_set: Dataset | None, progress: Progress
) -> None:
    """Train from ``progress`` to ``cfg.total_step``."""
    learning_rate = schedule.table(cfg)
    while progress.step < cfg.total_step:
        end = _next_stop(progress.step, cfg)
        stats = engine.train(end - progress.step)
        name_images = functools.partial(_names, cfg=cfg, stream=stream, ranks=engine.world.size)
        _note_skipped(stats, cfg, run, name_images=name_images, progress=progress)
        progress.step = end
        _log(stats, cfg, run, learning_rate=learning_rate[end - 1], progress=progress)
        if val_set is not None and _due(end, cfg.eval_interval, cfg):
            scores = evaluate(engine, val_set, cfg, how=quick(cfg.eval))
            _note_scores(scores, cfg, run, engine=engine, progress=progress)
        if _due(end, cfg.save_interval, cfg):
            save(end, cfg, run, engine=engine, progress=progress)
            checkpoint.prune(run.checkpoints, cfg.keep_checkpoint)


def quick(how: Eval) -> Eval:
    """Return how a run evaluates while it trains: as asked, but at scale 1 and without the mirrored image."""
    return dataclasses.replace(how, scales=(1.0,), flip=False)


def save(tag: int | str, cfg: Config, run: Run, *, engine: Engine, progress: Progress) -> None:
    """Write one checkpoint: the engine's state, and everything that resuming or using it needs to know."""
    tensors = engine.state()
    if not run.writes:
        return
    meta: dict[str, Any] = {
        "config": config.as_dict(cfg),
        "step": progress.step,
        "progress": dataclasses.asdict(progress),
        "versions": core_versions() | dict(engine.versions),
    }
    path = run.checkpoints / checkpoint.file_name(cfg.backbone.width, tag)
    checkpoint.save(path, tensors, meta)
    run.say(f"saved {path}")


def _due(step: int, interval: int, cfg: Config) -> bool:
    return step % interval == 0 or step == cfg.total_step


def _next_stop(step: int, cfg: Config) -> int:
    intervals = [cfg.log_interval, cfg.save_interval, *([cfg.eval_interval] if cfg.run_eval else [])]
    return min(cfg.total_step, *((step // interval + 1) * interval for interval in intervals))


def _note_skipped(
    stats: Stats, cfg: Config, run: Run, *, name_images: Callable[[int], str], progress: Progress
) -> None:
    """Count the steps that were not finite and name their images; stop after too many in a row."""
    for offset, finite in enumerate(stats.finite):
        if finite:
            progress.skipped_in_row = 0
            continue
        progress.skipped += 1
        progress.skipped_in_row += 1
        step = progress.step + offset
        names = name_images(step)
        run.say(f"step {step + 1}: loss or gradient is not finite; the step is skipped; images: {names}")
        if progress.skipped_in_row >= cfg.max_skipped:
            raise OcrnetError(
                f"{progress.skipped_in_row} steps in a row had a loss or gradient that is not finite, the last with "
                f"{names}; look at these images, lower lr_init, set clip_grad, or train with --mix False"
            )


def _names(step: int, cfg: Config, stream: TrainStream, ranks: int) -> str:
    """Return the names of a step's images; ranks together see what one rank with a larger batch sees."""
    batches = numbers(step, batch_size=cfg.batch_size * ranks, accumulate_steps=cfg.accumulate_steps, world=World())
    return ", ".join(stream.name(number) for batch in batches for number in batch)


def _log(stats: Stats, cfg: Config, run: Run, *, learning_rate: float, progress: Progress) -> None:
    """Say and record what a segment did; losses are means over its finite steps."""
    steps = len(stats.finite)
    taken = stats.loss[stats.finite]
    aux, ocr = (taken.mean(axis=0) if len(taken) else np.full(2, np.nan)).tolist()
    loss = cfg.loss.aux * aux + cfg.loss.ocr * ocr
    pace, speed = stats.seconds / steps, stats.samples / stats.seconds
    row = {
        "kind": "train",
        "step": progress.step,
        "loss": loss,
        "loss_aux": aux,
        "loss_ocr": ocr,
        "learning_rate": float(learning_rate),
        "skipped": progress.skipped,
        "images_per_second": speed,
        "seconds_per_step": pace,
        "data_seconds_per_step": stats.data_seconds / steps,
        "memory_bytes": stats.memory_bytes,
    }
    run.record({name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()})
    run.say(
        f"step {progress.step}/{cfg.total_step}  loss {loss:.4f} (aux {aux:.4f}, ocr {ocr:.4f})  "
        f"lr {learning_rate:.3e}  {speed:.2f} img/s  {pace * 1000:.0f} ms/step "
        f"(data {stats.data_seconds / steps * 1000:.0f})  "
        f"mem {stats.memory_bytes / 2**30:.2f} GiB  eta {duration(pace * (cfg.total_step - progress.step))}"
    )


def _note_scores(scores: Scores, cfg: Config, run: Run, *, engine: Engine, progress: Progress) -> None:
    """Say and record an evaluation; keep the best weights so far."""
    run.record({"kind": "eval", "step": progress.step, **as_dict(scores)})
    best = -math.inf if progress.best_mean_iou is None else progress.best_mean_iou
    better = scores.mean_iou > best
    run.say(
        f"step {progress.step}: mIoU {scores.mean_iou:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}"
        + (" (best so far)" if better else f" (best: {best:.4f} at step {progress.best_step})")
    )
    if better:
        progress.best_step, progress.best_mean_iou = progress.step, scores.mean_iou
        save("best", cfg, run, engine=engine, progress=progress)


def duration(seconds: float) -> str:
    """Return 1:02:03, with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"
