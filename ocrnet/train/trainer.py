"""The training loop: train a segment of steps, then log, evaluate or save a checkpoint if it is due; repeat."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ocrnet import config, weights
from ocrnet.cloud.push import Uploader
from ocrnet.config import Config, Eval
from ocrnet.data.datasets.base import Dataset
from ocrnet.data.sampler import TrainStream, rank_sample_indices
from ocrnet.data.visualize import side_by_side, thumbnail
from ocrnet.distributed.launcher import World
from ocrnet.engines import collectives, lr_schedule
from ocrnet.engines.base import Engine, Stats
from ocrnet.evaluation.evaluator import EvaluationStoppedError, Show, evaluate
from ocrnet.evaluation.metrics import Scores, as_dict
from ocrnet.tracking.progress_bar import ProgressBar
from ocrnet.tracking.run_dir import Run, core_versions
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)

# Maximum fraction of unreadable training images with data.on_error: skip; one unreadable image is always allowed.
UNREADABLE_SHARE = 0.01

# With several ranks, the longest time in seconds between two checks whether any rank has received a stop signal. It is
# much shorter than the grace period of schedulers.
STOP_CHECK_SECONDS = 5.0

# Longer side of each panel of a saved sample (image, prediction, ground truth).
SAMPLE_SIDE_PIXELS = 640


@dataclass
class Progress:
    """State of the training loop, which a checkpoint stores together with the engine's state."""

    step: int = 0
    evaluated_step: int = 0
    best_step: int | None = None
    best_mean_iou: float | None = None
    skipped: int = 0
    skipped_in_row: int = 0
    unreadable: list[str] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # aux, ocr of the finite steps since the last log line


@dataclass
class ThroughputMeter:
    """Times, sample count and memory of the steps since the last log line; a checkpoint does not store them."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    memory_bytes: int = 0

    def add(self, stats: Stats) -> None:
        """Add the measurements of a segment."""
        self.steps += len(stats.finite)
        self.samples += stats.samples
        self.seconds += stats.seconds
        self.data_seconds += stats.data_seconds
        self.memory_bytes = stats.memory_bytes


@dataclass
class Loop:
    """The training loop of one rank.

    ``stopped`` returns the number of the signal that requested this rank to stop, or 0. If any rank receives such a
    signal, all ranks complete the current step, rank 0 saves a checkpoint, and all ranks stop. ``push`` uploads the
    files of the run; it is None on ranks other than 0 and in runs without uploads.
    """

    cfg: Config
    engine: Engine
    run: Run
    stream: TrainStream
    val_set: Dataset | None
    progress: Progress
    stopped: Callable[[], int]
    push: Uploader | None = None

    def fit(self) -> int:
        """Train from ``progress.step`` to total_step or a stop signal; return the number of the signal, or 0."""
        self._throughput = ThroughputMeter()
        self._steps_to_stop_check = 1
        self._saved_step: int | None = None
        self._learning_rate = lr_schedule.table(self.cfg, self.engine.world.size)
        # None: show the bar if stdout is a terminal. mpirun gives its ranks a pseudo-terminal, which shows no bar.
        shown = None if self.engine.world.size == 1 else False
        with ProgressBar(self.cfg.total_step, self.progress.step, shown=shown) as self._bar:
            if self._evaluation_is_due():  # the previous run stopped between this step and its evaluation
                self._evaluate_and_save_if_due()
            while self.progress.step < self.cfg.total_step and not self._stop_signal_of_any_rank():
                stats = self._train_segment()
                with collectives.propagate_errors(self.engine):
                    self._accumulate_stats(stats)
                    self._bar.set_step(self.progress.step)
                    self._log_if_due()
                self._evaluate_and_save_if_due()
            if self._stop_signal_of_any_rank():
                with collectives.propagate_errors(self.engine):
                    self._save_once()
        with collectives.propagate_errors(self.engine):
            self.run.draw_curves()
        return self._stop_signal_of_any_rank()

    def _stop_signal_of_any_rank(self) -> int:
        """Return the number of the stop signal that any rank has received, or 0; this is a collective."""
        return collectives.all_reduce_max(self.engine, self.stopped())

    def _train_segment(self) -> Stats:
        """Train until the next log line, evaluation or checkpoint is due.

        The segment is shorter if a stop signal arrives (one rank), or if the next check for stop signals is due
        (several ranks).
        """
        steps = self._next_due_step() - self.progress.step
        single_rank = self.engine.world.size == 1
        with self._save_on_failure(on_all_ranks=single_rank):
            if single_rank:
                return self.engine.train(steps, self._after_step)
            steps = min(steps, self._steps_to_stop_check)
            stats = self.engine.train(steps)
            if len(stats.finite) < steps:
                self._raise_step_error(stats)
        self._agree_on_segment_length(stats)
        return self._gather_unreadable(stats)

    def _raise_step_error(self, stats: Stats) -> None:
        """Raise the error that ended the segment early on this rank.

        Other ranks may be waiting in a collective of the failed step, so this method must not call a collective.
        """
        self._accumulate_stats(stats)
        self.engine.train(1)
        raise AssertionError("a step failed, but the next call did not raise its error")

    def _agree_on_segment_length(self, stats: Stats) -> None:
        """Set the number of steps until the next check for stop signals, the same on all ranks.

        The slowest rank determines the number. It at most doubles, because the first measured time is unreliable.
        """
        seconds = max(collectives.all_gather(self.engine, round(stats.seconds * 1e6))) / 1e6
        steps = int(STOP_CHECK_SECONDS * len(stats.finite) / max(seconds, 1e-6))
        self._steps_to_stop_check = max(1, min(2 * self._steps_to_stop_check, steps))

    def _gather_unreadable(self, stats: Stats) -> Stats:
        if self.cfg.data.on_error == "fail":
            return stats
        errors = itertools.chain.from_iterable(collectives.gather_strings(self.engine, stats.unreadable))
        return dataclasses.replace(stats, unreadable=tuple(errors))

    @contextlib.contextmanager
    def _save_on_failure(self, *, on_all_ranks: bool) -> Iterator[None]:
        """Save a checkpoint of the finished steps if the enclosed code raises `OcrnetError`.

        The enclosed code must leave the engine in the state after ``progress.step``. With ``on_all_ranks``, the
        enclosed code fails on all ranks, and all wait until rank 0 has saved. Otherwise only this rank has failed and
        no collective is possible: the checkpoint is saved only if this is rank 0, whose error then mentions it.
        """
        try:
            yield
        except OcrnetError as error:
            if self.progress.step == 0 or not (on_all_ranks or self.run.writes):
                raise
            try:
                with collectives.propagate_errors(self.engine) if on_all_ranks else contextlib.nullcontext():
                    # mutation: save-steps-before-error
                    self._save_once()
            except OcrnetError as save_error:
                raise OcrnetError(f"{error}; the finished steps cannot be saved either: {save_error}") from error
            raise OcrnetError(
                f"{error}; step {self.progress.step} is saved; resume from it with --resume_ckpt auto"
            ) from error

    def _save_once(self) -> None:
        """Save a checkpoint of the current step, unless it is already saved."""
        if self._saved_step != self.progress.step:
            self._save(self.progress.step)

    def _after_step(self) -> bool:
        self._bar.advance()
        return bool(self.stopped())

    def _due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.cfg.total_step

    def _next_due_step(self) -> int:
        cfg, step = self.cfg, self.progress.step
        intervals = [cfg.log_interval, cfg.save_interval, *([cfg.eval_interval] if self.val_set else [])]
        return min(cfg.total_step, *((step // interval + 1) * interval for interval in intervals))

    def _accumulate_stats(self, stats: Stats) -> None:
        """Add the results of a segment to ``progress``.

        Raise `OcrnetError` if too many steps in a row were skipped or too many images are unreadable.
        """
        progress = self.progress
        self._throughput.add(stats)
        for offset, finite in enumerate(stats.finite):
            if finite:
                progress.skipped_in_row = 0
                progress.losses.append(stats.loss[offset].tolist())
            else:
                self._record_skipped_step(progress.step + offset)
        progress.step += len(stats.finite)
        for error in stats.unreadable:
            self._record_unreadable(error)

    def _record_skipped_step(self, step: int) -> None:
        progress, cfg = self.progress, self.cfg
        progress.skipped += 1
        progress.skipped_in_row += 1
        # Name the images of all ranks: their batches together are the batch of one rank with a larger batch_size.
        batch_size = cfg.batch_size * self.engine.world.size
        batches = rank_sample_indices(step, batch_size=batch_size, accumulate_steps=cfg.accumulate_steps, world=World())
        image_names = ", ".join(self.stream.name(number) for batch in batches for number in batch)
        logger.warning(f"step {step + 1}: loss or gradient is not finite; the step is skipped; images: {image_names}")
        # mutation: end-after-max-skipped
        if progress.skipped_in_row >= cfg.max_skipped:
            first = step + 2 - progress.skipped_in_row
            raise OcrnetError(
                f"{progress.skipped_in_row} steps in a row had a loss or gradient that is not finite (images of the "
                f"last one: {image_names}); resume from a checkpoint well before step {first}, the first of them "
                "(--resume_ckpt FILE), or start again in another save_dir; lower lr_init, set clip_grad, or train with "
                "--mix False"
            )

    def _record_unreadable(self, error: str) -> None:
        if error in self.progress.unreadable:
            return
        self.progress.unreadable.append(error)
        logger.warning(f"unreadable image, replaced by another image: {error}")
        count, images = len(self.progress.unreadable), len(self.stream.dataset)
        # mutation: cap-unreadable-images
        if count > max(1, UNREADABLE_SHARE * images):
            raise OcrnetError(
                f"{count} of {images} training images are unreadable, more than data.on_error: skip allows (1 in 100); "
                f"the last one: {error}"
            )

    def _log_if_due(self) -> None:
        """If a log line is due, write it and a row of metrics.jsonl; the loss is the mean over steps not skipped."""
        cfg, progress, throughput = self.cfg, self.progress, self._throughput
        if not self._due(cfg.log_interval):
            return
        losses = np.array(progress.losses).reshape(-1, 2)
        aux, ocr = losses.mean(axis=0).tolist() if len(losses) else (math.nan, math.nan)
        row = {
            "kind": "train",
            "step": progress.step,
            "loss": cfg.loss.aux * aux + cfg.loss.ocr * ocr,
            "loss_aux": aux,
            "loss_ocr": ocr,
            "learning_rate": float(self._learning_rate[progress.step - 1]),
            "skipped": progress.skipped,
            "images_per_second": throughput.samples / throughput.seconds,
            "seconds_per_step": throughput.seconds / throughput.steps,
            "data_seconds_per_step": throughput.data_seconds / throughput.steps,
            "memory_bytes": throughput.memory_bytes,
        }
        self.run.record({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
        logger.info(log_line(row, cfg))
        self._bar.show_row(row)
        progress.losses, self._throughput = [], ThroughputMeter()

    def _evaluation_is_due(self) -> bool:
        progress = self.progress
        new = progress.evaluated_step < progress.step
        return self.val_set is not None and new and self._due(self.cfg.eval_interval)

    def _evaluate_and_save_if_due(self) -> None:
        progress = self.progress
        if self._evaluation_is_due():
            assert self.val_set is not None
            eval_cfg = single_scale(self.cfg.eval)
            show = self._make_sample_writer(self.val_set)
            try:
                with self._save_on_failure(on_all_ranks=True):
                    scores = evaluate(
                        self.engine,
                        self.val_set,
                        self.cfg,
                        eval_cfg=eval_cfg,
                        show=show,
                        stopped=self.stopped,
                    )
            except EvaluationStoppedError:
                return  # the resumed run begins with this evaluation
            progress.evaluated_step = progress.step
            with collectives.propagate_errors(self.engine):
                self._record_scores(scores)
        # After several skipped steps in a row, the weights are unchanged; saving them would remove an older checkpoint.
        repeated_skips = progress.skipped_in_row > 1 and progress.step < self.cfg.total_step
        if self._due(self.cfg.save_interval) and not repeated_skips:
            with collectives.propagate_errors(self.engine):
                self._save(progress.step)
                if self.run.writes:
                    # mutation: keep-unconfirmed-checkpoint
                    unconfirmed = self.push.unconfirmed() if self.push else ()
                    checkpoint.prune(self.run.checkpoints, self.cfg.keep_checkpoint, unconfirmed)

    def _make_sample_writer(self, dataset: Dataset) -> Show:
        """Return a callback that saves ``eval_samples`` of rank 0's evaluated images, each next to its prediction."""
        rank_indices = range(self.engine.world.rank, len(dataset), self.engine.world.size)
        count = min(self.cfg.eval_samples, len(rank_indices)) if self.run.writes else 0
        selected = {rank_indices[i * len(rank_indices) // count] for i in range(count)}

        def show(index: int, image: np.ndarray, prediction: np.ndarray, label: np.ndarray) -> None:
            if index in selected:
                panels = [thumbnail(array, SAMPLE_SIDE_PIXELS) for array in (image, prediction, label)]
                classes = dataset.classes
                comparison = side_by_side(*panels, palette=classes.palette, names=classes.names)
                self.run.sample(dataset.name(index), self.progress.step, comparison)

        return show

    def _record_scores(self, scores: Scores) -> None:
        """Log and record the scores of an evaluation; save the best checkpoint if mIoU is the highest so far."""
        progress = self.progress
        self.run.record({"kind": "eval", "step": progress.step, **as_dict(scores)})
        self.run.draw_curves()
        best = -math.inf if progress.best_mean_iou is None else progress.best_mean_iou
        better = scores.mean_iou > best
        logger.info(
            f"step {progress.step}: mIoU {scores.mean_iou:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}"
            + (" (best so far)" if better else f" (best: {best:.4f} at step {progress.best_step})")
        )
        if better:
            progress.best_step, progress.best_mean_iou = progress.step, scores.mean_iou
            self._save("best")

    def _save(self, tag: int | str) -> None:
        """Save a checkpoint: the engine's state, with the metadata for resuming and for prediction.

        ``tag`` is the step, or ``best``. Raise `OcrnetError` if a tensor is not finite.
        """
        tensors = self.engine.state()
        if not self.run.writes:
            return
        for name, array in tensors.items():
            # mutation: never-save-nonfinite-state
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise OcrnetError(
                    f"after step {self.progress.step}, {name} is not finite, so no checkpoint is saved; resume "
                    f"from an earlier one in {self.run.checkpoints}, and lower lr_init, set clip_grad, or train with "
                    "--mix False"
                )
        classes = self.stream.dataset.classes
        meta: dict[str, Any] = {
            "config": config.as_dict(self.cfg),
            "classes": {"names": list(classes.names), "palette": [list(color) for color in classes.palette]},
            "step": self.progress.step,
            "cards": self.engine.world.size,
            "progress": dataclasses.asdict(self.progress),
            "versions": core_versions() | dict(self.engine.versions),
        }
        path = self.run.checkpoints / checkpoint.file_name(self.cfg.backbone.width, tag)
        checkpoint.save(path, tensors, meta)
        if tag == self.progress.step:
            self._saved_step = self.progress.step
        if self._writes_ckpt():
            ckpt_meta = {key: value for key, value in meta.items() if key != "progress"}
            weights.write_ckpt(path.with_suffix(".ckpt"), tensors, ckpt_meta)
        logger.info(f"saved {path}")
        if self.push:
            self.push.queue_files()
            self.push.queue_checkpoint(path)

    def _writes_ckpt(self) -> bool:
        configured = self.cfg.save_mindspore_ckpt
        return "mindspore" in self.engine.versions if configured is None else configured


def single_scale(eval_cfg: Eval) -> Eval:
    """Return the configured evaluation settings, but with only scale 1 and without flip, for use during training."""
    return dataclasses.replace(eval_cfg, scales=(1.0,), flip=False)


def log_line(row: dict[str, Any], cfg: Config) -> str:
    """Format a training row of metrics.jsonl as a log line."""
    seconds_per_step = row["seconds_per_step"]
    return (
        f"step {row['step']}/{cfg.total_step}  loss {row['loss']:.4f} "
        f"(aux {row['loss_aux']:.4f}, ocr {row['loss_ocr']:.4f})  lr {row['learning_rate']:.3e}  "
        f"{row['images_per_second']:.2f} img/s  {seconds_per_step * 1000:.0f} ms/step "
        f"(data {row['data_seconds_per_step'] * 1000:.0f})  mem {row['memory_bytes'] / 2**30:.2f} GiB  "
        f"eta {duration(seconds_per_step * (cfg.total_step - row['step']))}"
    )


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, for example 1:02:03 or 2 d 0:00:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"
