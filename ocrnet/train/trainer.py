"""The training loop: run a segment of steps, then log, evaluate and save when each is due."""

import contextlib
import dataclasses
import itertools
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
from ocrnet.evaluation.evaluator import AbandonedError, Show, evaluate
from ocrnet.evaluation.metrics import Scores, as_dict
from ocrnet.tracking.progress_bar import ProgressBar
from ocrnet.tracking.run_dir import Run, core_versions
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

# Maximum share of unreadable training images with data.on_error: skip; a single one is always allowed.
UNREADABLE_SHARE = 0.01

# Several ranks vote on a stop at least this often, in seconds: well within the grace period of schedulers.
VOTE_SECONDS = 5.0

# Longer side of the panels of a sample picture, in pixels.
SAMPLE_SIDE = 640


@dataclass
class Progress:
    """The state of the loop itself; a checkpoint stores it together with the engine's state, to resume the run."""

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
    """Measurements of the steps since the last log line; as measurements, they are not part of the run's state."""

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
    """One training run, on each of its ranks.

    ``stopped`` returns the number of the signal that requested this rank to stop, or 0. If one rank is requested to
    stop, all ranks stop after a step and with a checkpoint. ``push`` uploads the files of the run; it is None on ranks
    other than 0 and in runs without uploads.
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
        """Train from ``progress`` to the config's total_step or a stop request; return the signal's number, or 0."""
        self._pace = ThroughputMeter()
        self._steps_to_vote = 1
        self._saved_step: int | None = None
        self._learning_rate = lr_schedule.table(self.cfg, self.engine.world.size)
        shown = None if self.engine.world.size == 1 else False  # the terminal of mpirun's ranks is not a real one
        with ProgressBar(self.cfg.total_step, self.progress.step, shown=shown) as self._bar:
            if self._evaluation_is_due():  # the run was stopped between the step and its evaluation
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
        """Return the number of the signal that requested this or any other rank to stop; 0 if there is none."""
        return collectives.all_reduce_max(self.engine, self.stopped())

    def _train_segment(self) -> Stats:
        """Train until something is due.

        A single rank ends earlier at a stop request; several ranks end earlier at their next vote.
        """
        steps = self._next_stop() - self.progress.step
        alone = self.engine.world.size == 1
        with self._saved_on_failure(agreed=alone):
            if alone:
                return self.engine.train(steps, self._between_steps)
            steps = min(steps, self._steps_to_vote)
            stats = self.engine.train(steps)
            if len(stats.finite) < steps:
                self._fail_alone(stats)
        self._agree_on_segment_length(stats)
        return self._with_unreadable_of_all(stats)

    def _fail_alone(self, stats: Stats) -> None:
        """Raise the error that ended the segment of this rank early.

        Other ranks may be waiting in that step, so this method must not call a collective.
        """
        self._accumulate_stats(stats)
        self.engine.train(1)
        raise AssertionError("a step failed, but the next call did not raise its error")

    def _agree_on_segment_length(self, stats: Stats) -> None:
        """Set the same number of steps to the next vote on all ranks, based on the slowest rank.

        At most double the number, because the first measured pace is unreliable.
        """
        seconds = max(collectives.all_gather(self.engine, round(stats.seconds * 1e6))) / 1e6
        within = int(VOTE_SECONDS * len(stats.finite) / max(seconds, 1e-6))
        self._steps_to_vote = max(1, min(2 * self._steps_to_vote, within))

    def _with_unreadable_of_all(self, stats: Stats) -> Stats:
        if self.cfg.data.on_error == "fail":
            return stats
        errors = itertools.chain.from_iterable(collectives.gather_strings(self.engine, stats.unreadable))
        return dataclasses.replace(stats, unreadable=tuple(errors))

    @contextlib.contextmanager
    def _saved_on_failure(self, *, agreed: bool) -> Iterator[None]:
        """Save the finished steps if the body fails; the body must leave the engine at the step in ``progress``.

        With ``agreed``, all ranks fail together and wait until rank 0 has saved. Otherwise the other ranks may be at
        any point and do not take part: rank 0 saves without a collective, and only its error mentions the checkpoint.
        """
        try:
            yield
        except OcrnetError as error:
            if self.progress.step == 0 or not (agreed or self.run.writes):
                raise
            try:
                with collectives.propagate_errors(self.engine) if agreed else contextlib.nullcontext():
                    # mutation: save-steps-before-error
                    self._save_once()
            except OcrnetError as second:
                raise OcrnetError(f"{error}; the finished steps cannot be saved either: {second}") from error
            raise OcrnetError(
                f"{error}; step {self.progress.step} is saved; resume from it with --resume_ckpt auto"
            ) from error

    def _save_once(self) -> None:
        """Write the checkpoint of this step, unless this run has already written it."""
        if self._saved_step != self.progress.step:
            self._save(self.progress.step)

    def _between_steps(self) -> bool:
        self._bar.advance()
        return bool(self.stopped())

    def _due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.cfg.total_step

    def _next_stop(self) -> int:
        cfg, step = self.cfg, self.progress.step
        intervals = [cfg.log_interval, cfg.save_interval, *([cfg.eval_interval] if self.val_set else [])]
        return min(cfg.total_step, *((step // interval + 1) * interval for interval in intervals))

    def _accumulate_stats(self, stats: Stats) -> None:
        """Add a segment to the loop's state; raise if too many steps are skipped or too many images are unreadable."""
        progress = self.progress
        self._pace.add(stats)
        for offset, finite in enumerate(stats.finite):
            if finite:
                progress.skipped_in_row = 0
                progress.losses.append(stats.loss[offset].tolist())
            else:
                self._note_skipped(progress.step + offset)
        progress.step += len(stats.finite)
        for error in stats.unreadable:
            self._note_unreadable(error)

    def _note_skipped(self, step: int) -> None:
        progress, cfg = self.progress, self.cfg
        progress.skipped += 1
        progress.skipped_in_row += 1
        # Name the images of all ranks: together they process the batch of a single rank with a larger batch size.
        batch_size = cfg.batch_size * self.engine.world.size
        batches = rank_sample_indices(step, batch_size=batch_size, accumulate_steps=cfg.accumulate_steps, world=World())
        names = ", ".join(self.stream.name(number) for batch in batches for number in batch)
        self.run.say(f"step {step + 1}: loss or gradient is not finite; the step is skipped; images: {names}")
        # mutation: end-after-max-skipped
        if progress.skipped_in_row >= cfg.max_skipped:
            first = step + 2 - progress.skipped_in_row
            raise OcrnetError(
                f"{progress.skipped_in_row} steps in a row had a loss or gradient that is not finite, the last with "
                f"{names}; resume from a checkpoint well before step {first}, where it began (--resume_ckpt FILE), "
                "or start again in another save_dir; lower lr_init, set clip_grad, or train with --mix False"
            )

    def _note_unreadable(self, error: str) -> None:
        if error in self.progress.unreadable:
            return
        self.progress.unreadable.append(error)
        self.run.say(f"unreadable, replaced by another image: {error}")
        found, images = len(self.progress.unreadable), len(self.stream.dataset)
        # mutation: cap-unreadable-images
        if found > max(1, UNREADABLE_SHARE * images):
            raise OcrnetError(
                f"{found} of {images} training images are unreadable, more than data.on_error: skip allows (1 in 100); "
                f"the last: {error}"
            )

    def _log_if_due(self) -> None:
        """Log and record the steps since the last log line, if one is due; skipped steps do not count in the loss."""
        cfg, progress, pace = self.cfg, self.progress, self._pace
        for line in self.push.take_log_lines() if self.push else ():
            self.run.say(line)
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
            "images_per_second": pace.samples / pace.seconds,
            "seconds_per_step": pace.seconds / pace.steps,
            "data_seconds_per_step": pace.data_seconds / pace.steps,
            "memory_bytes": pace.memory_bytes,
        }
        self.run.record({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
        self.run.say(log_line(row, cfg))
        self._bar.show_row(row)
        progress.losses, self._pace = [], ThroughputMeter()

    def _evaluation_is_due(self) -> bool:
        progress = self.progress
        new = progress.evaluated_step < progress.step
        return self.val_set is not None and new and self._due(self.cfg.eval_interval)

    def _evaluate_and_save_if_due(self) -> None:
        progress = self.progress
        if self._evaluation_is_due():
            assert self.val_set is not None
            eval_cfg = quick(self.cfg.eval)
            show = self._sampler(self.val_set)
            try:
                with self._saved_on_failure(agreed=True):
                    scores = evaluate(
                        self.engine,
                        self.val_set,
                        self.cfg,
                        eval_cfg=eval_cfg,
                        show=show,
                        say=self.run.say,
                        stopped=self.stopped,
                    )
            except AbandonedError:
                return  # the resumed run begins with this evaluation
            progress.evaluated_step = progress.step
            with collectives.propagate_errors(self.engine):
                self._note_scores(scores)
        # A series of skipped steps leaves the weights unchanged: saving them would only displace valid checkpoints.
        in_a_series = progress.skipped_in_row > 1 and progress.step < self.cfg.total_step
        if self._due(self.cfg.save_interval) and not in_a_series:
            with collectives.propagate_errors(self.engine):
                self._save(progress.step)
                if self.run.writes:
                    # mutation: keep-unconfirmed-checkpoint
                    spared = self.push.unconfirmed() if self.push else ()
                    checkpoint.prune(self.run.checkpoints, self.cfg.keep_checkpoint, spared)

    def _sampler(self, dataset: Dataset) -> Show:
        """Return a callback for each image of an evaluation; it saves some images of rank 0's share as pictures."""
        share = range(self.engine.world.rank, len(dataset), self.engine.world.size)
        count = min(self.cfg.eval_samples, len(share)) if self.run.writes else 0
        chosen = {share[i * len(share) // count] for i in range(count)}

        def show(index: int, image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> None:
            if index in chosen:
                small = [thumbnail(array, SAMPLE_SIDE) for array in (image, prediction, truth)]
                classes = dataset.classes
                picture = side_by_side(*small, palette=classes.palette, names=classes.names)
                self.run.sample(dataset.name(index), self.progress.step, picture)

        return show

    def _note_scores(self, scores: Scores) -> None:
        """Log and record an evaluation; save the weights if they are the best so far."""
        progress = self.progress
        self.run.record({"kind": "eval", "step": progress.step, **as_dict(scores)})
        self.run.draw_curves()
        best = -math.inf if progress.best_mean_iou is None else progress.best_mean_iou
        better = scores.mean_iou > best
        self.run.say(
            f"step {progress.step}: mIoU {scores.mean_iou:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}"
            + (" (best so far)" if better else f" (best: {best:.4f} at step {progress.best_step})")
        )
        if better:
            progress.best_step, progress.best_mean_iou = progress.step, scores.mean_iou
            self._save("best")

    def _save(self, tag: int | str) -> None:
        """Write one checkpoint: the engine's state, and all metadata that is needed to resume from it or to use it."""
        tensors = self.engine.state()
        if not self.run.writes:
            return
        for name, array in tensors.items():
            # mutation: never-save-nonfinite-state
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise OcrnetError(
                    f"after step {self.progress.step}, {name} is not finite; this step is not saved, the checkpoints "
                    f"in {self.run.checkpoints} are from earlier steps; lower lr_init, set clip_grad, or train with "
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
            about = {key: value for key, value in meta.items() if key != "progress"}
            weights.write_ckpt(path.with_suffix(".ckpt"), tensors, about)
        self.run.say(f"saved {path}")
        if self.push:
            self.push.queue_files()
            self.push.queue_checkpoint(path)

    def _writes_ckpt(self) -> bool:
        asked = self.cfg.save_mindspore_ckpt
        return "mindspore" in self.engine.versions if asked is None else asked


def quick(eval_cfg: Eval) -> Eval:
    """Return the evaluation settings during training: as configured, but at scale 1 and without flip."""
    return dataclasses.replace(eval_cfg, scales=(1.0,), flip=False)


def log_line(row: dict[str, Any], cfg: Config) -> str:
    """Return a row of metrics.jsonl as a readable log line."""
    pace = row["seconds_per_step"]
    return (
        f"step {row['step']}/{cfg.total_step}  loss {row['loss']:.4f} "
        f"(aux {row['loss_aux']:.4f}, ocr {row['loss_ocr']:.4f})  lr {row['learning_rate']:.3e}  "
        f"{row['images_per_second']:.2f} img/s  {pace * 1000:.0f} ms/step "
        f"(data {row['data_seconds_per_step'] * 1000:.0f})  mem {row['memory_bytes'] / 2**30:.2f} GiB  "
        f"eta {duration(pace * (cfg.total_step - row['step']))}"
    )


def duration(seconds: float) -> str:
    """Return seconds as 1:02:03, preceded by the number of days if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"
