"""The training loop, with an engine of NumPy: when it logs, evaluates and saves, and how it handles skipped steps."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ocrnet import weights
from ocrnet.config import Config, Data
from ocrnet.data.datasets.base import ClassTable, Dataset, Pair
from ocrnet.data.image_io import write_png
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Stats
from ocrnet.tracking.run_dir import Run
from ocrnet.train.trainer import Loop, Progress, duration
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt

CONFIG = Config(
    num_classes=2, total_step=10, log_interval=4, save_interval=5, eval_interval=6, keep_checkpoint=1, num_workers=0,
    batch_size=1, max_skipped=3, data=Data(crop_size=(32, 32)),
)  # fmt: skip


class CountingEngine:
    """An engine whose weights count its steps; ``bad`` steps are not finite; it predicts class 1 from step ``good``."""

    world, startup_messages, versions = World(), (), {"counting": "1"}

    def __init__(self, *, bad: tuple[int, ...] = (), good: int = 0, stops: tuple[int, ...] = ()) -> None:
        self.step, self.bad, self.good, self.stops, self.segments = 0, bad, good, stops, []

    def train(self, steps: int, stopped=lambda: False) -> Stats:
        steps = next((i for i in range(1, steps) if self.step + i in self.stops), steps)
        self.segments.append(steps)
        finite = np.array([self.step + i not in self.bad for i in range(steps)])
        self.step += steps
        numbers = np.arange(self.step - steps, self.step)[:, None]
        loss = np.where(finite[:, None], numbers * 0.1 + [0.5, 1.0], np.nan)
        return Stats(loss, finite, steps, 2.0, 0.1, 2**30)

    def predict(self, images, passes, outputs=("labels",)):
        return {"labels": np.full(images.shape[:3], int(self.step >= self.good), np.uint8)}

    def state(self):
        return {"count": np.array([self.step])}

    def sum(self, array):
        return array


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return three_images(tmp_path)


def three_images(folder: Path) -> Dataset:
    pairs = []
    for name in ("a", "b", "c"):
        write_png(folder / f"{name}.png", np.zeros((40, 40, 3), np.uint8))
        write_png(folder / f"{name}_label.png", np.ones((40, 40), np.uint8))
        pairs.append(Pair(name, folder / f"{name}.png", folder / f"{name}_label.png"))
    classes = ClassTable(("zero", "one"), ((0, 0, 0), (9, 9, 9)), (0, 1), frozenset({255}))
    return Dataset(classes, pairs, folder)


def run_loop(engine, dataset, folder, *, progress=None, stopped=lambda: False, **changes):
    cfg = dataclasses.replace(CONFIG, save_dir=str(folder), **changes)
    run = Run(folder)
    run.begin(cfg, {})
    run.open_log()
    stream = TrainStream(dataset, cfg.data, seed=cfg.seed, channels=4, dropout=0.0)
    progress = progress or Progress()
    Loop(cfg, engine, run, stream, dataset if cfg.run_eval else None, progress, stopped).fit()
    return run, progress


def rows(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_segments_end_at_each_log_line_evaluation_and_checkpoint(dataset, tmp_path):
    engine = CountingEngine()
    run, progress = run_loop(engine, dataset, tmp_path / "out")
    assert engine.segments == [4, 1, 1, 2, 2]  # log at 4, save at 5, evaluate at 6, log at 8, all three at 10
    assert progress.step == 10
    assert [row["step"] for row in rows(run) if row["kind"] == "eval"] == [6, 10]
    assert [checkpoint.step_of(path) for path in checkpoint.steps(run.checkpoints)] == [10]


def test_an_interval_longer_than_the_run_applies_at_its_end(dataset, tmp_path):
    engine = CountingEngine()
    run, _ = run_loop(engine, dataset, tmp_path / "out", log_interval=99, save_interval=99, eval_interval=99)
    assert engine.segments == [10]
    assert [(row["kind"], row["step"]) for row in rows(run)] == [("train", 10), ("eval", 10)]


def test_the_best_checkpoint_is_saved_and_recorded(dataset, tmp_path):
    engine = CountingEngine(good=6)
    run, progress = run_loop(engine, dataset, tmp_path / "out", eval_interval=2, save_interval=99)
    best = checkpoint.load(run.checkpoints / checkpoint.file_name(CONFIG.backbone.width, "best"))
    assert (progress.best_step, progress.best_mean_iou) == (6, 1.0)
    assert best.meta["step"] == 6
    assert best.tensors["count"].tolist() == [6]
    last = checkpoint.load(checkpoint.steps(run.checkpoints)[-1])
    assert last.meta["progress"] == dataclasses.asdict(progress)


@pytest.mark.parametrize(
    ("option", "framework", "written"),
    [(None, "counting", False), (None, "mindspore", True), (True, "counting", True), (False, "mindspore", False)],
)
def test_mindspore_weights_are_saved_next_to_each_checkpoint(
    dataset, tmp_path, monkeypatch, option, framework, written
):
    monkeypatch.setattr(CountingEngine, "versions", {framework: "1"})
    old = tmp_path / "out/checkpoint" / checkpoint.file_name(CONFIG.backbone.width, "best")
    old.parent.mkdir(parents=True)
    old.with_suffix(".ckpt").touch()
    run, _ = run_loop(CountingEngine(), dataset, tmp_path / "out", save_mindspore_ckpt=option)
    stems = {path.stem for path in run.checkpoints.glob("*.safetensors")}
    assert len(stems) == 2  # the last and the best
    assert {path.stem for path in run.checkpoints.glob("*.ckpt")} == (stems if written else set())
    if written:
        loaded = ckpt.read(old.with_suffix(".ckpt"))
        assert loaded["count"] == checkpoint.load(old).tensors["count"]
        stored = checkpoint.parse_document(old, loaded[weights.DOCUMENT].tobytes().decode())
        assert (stored["step"], stored["config"]["num_classes"], "progress" in stored) == (6, 2, False)


def test_a_worse_model_after_a_resume_does_not_replace_the_best(dataset, tmp_path):
    engine = CountingEngine(good=99)
    engine.step = 6
    before = Progress(step=6, best_step=6, best_mean_iou=0.9)
    run, progress = run_loop(engine, dataset, tmp_path / "out", progress=before)
    assert (progress.best_step, progress.best_mean_iou) == (6, 0.9)
    assert not (run.checkpoints / checkpoint.file_name(CONFIG.backbone.width, "best")).exists()


def test_a_skipped_step_is_counted_and_its_images_are_logged(dataset, tmp_path):
    run, progress = run_loop(CountingEngine(bad=(2, 6)), dataset, tmp_path / "out")
    assert (progress.skipped, progress.skipped_in_row) == (2, 0)
    lines = [line for line in run.log.read_text().splitlines() if "not finite" in line]
    assert len(lines) == 2
    stream = TrainStream(dataset, CONFIG.data, seed=CONFIG.seed, channels=4, dropout=0.0)
    assert lines[0].endswith(f"step 3: loss or gradient is not finite; the step is skipped; images: {stream.name(2)}")
    losses = {row["step"]: row["loss_aux"] for row in rows(run) if row["kind"] == "train"}
    expected = {4: [0, 1, 3], 8: [4, 5, 7], 10: [8, 9]}  # the mean over the finite steps since the last line
    assert losses == pytest.approx({step: 0.5 + 0.1 * np.mean(steps) for step, steps in expected.items()})


def test_too_many_skipped_steps_in_a_row_end_the_run(dataset, tmp_path):
    with pytest.raises(
        OcrnetError, match=r"3 steps in a row had a loss or gradient that is not finite.* before step 4,"
    ):
        run_loop(CountingEngine(bad=(3, 4, 5)), dataset, tmp_path / "out")  # in three segments
    run_loop(CountingEngine(bad=(3, 4, 6)), dataset, tmp_path / "other")


@pytest.mark.parametrize(("bad", "saved"), [((4,), [5, 10]), ((3, 4), [10]), ((8, 9), [5, 10])])
def test_no_checkpoint_is_saved_within_a_series_of_skipped_steps(dataset, tmp_path, bad, saved):
    run, _ = run_loop(CountingEngine(bad=bad), dataset, tmp_path / "out", keep_checkpoint=0)
    assert [checkpoint.step_of(path) for path in checkpoint.steps(run.checkpoints)] == saved


def stop_at(engine, step):
    return lambda: engine.step >= step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_loop(CountingEngine(good=8, bad=(2,)), three_images(folder), folder / "out")


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 7])
def test_a_run_stopped_and_resumed_at_any_step_ends_like_an_uninterrupted_one(dataset, uninterrupted, tmp_path, step):
    """Also if the stop comes before the evaluation that is due at the same step (6)."""
    expected_run, progress = uninterrupted
    engine = CountingEngine(good=8, bad=(2,), stops=(step,))
    folder = tmp_path / "out"
    run, _ = run_loop(engine, dataset, folder, stopped=stop_at(engine, step))
    loaded = checkpoint.load(checkpoint.steps(run.checkpoints)[-1])
    resumed = Progress(**loaded.meta["progress"])
    assert (resumed.step, loaded.tensors["count"].tolist()) == (step, [step])
    assert (resumed.evaluated_step == 0) == (step <= 6)
    run.truncate_metrics(step=resumed.step, evaluated_step=resumed.evaluated_step)
    again = CountingEngine(good=8, bad=(2,))
    again.step = step
    run, _ = run_loop(again, dataset, folder, progress=resumed)
    assert rows(run) == [
        {k: pytest.approx(v) if k.endswith(("second", "per_step")) else v for k, v in row.items()} | timings(mine)
        for row, mine in zip(rows(expected_run), rows(run), strict=True)
    ]
    assert resumed == progress
    for name in (10, "best"):
        files = [r.checkpoints / checkpoint.file_name(CONFIG.backbone.width, name) for r in (expected_run, run)]
        metas = [checkpoint.load(path).meta for path in files]
        for meta in metas:
            meta["config"].pop("save_dir")
        assert metas[0] == metas[1]


def timings(row):
    return {
        name: row[name] for name in ("images_per_second", "seconds_per_step", "data_seconds_per_step") if name in row
    }


def test_a_state_that_is_not_finite_is_never_saved(dataset, tmp_path):
    class Overflowing(CountingEngine):
        def state(self):
            return {"count": np.array([self.step]), "cls_head.bias": np.array([1.0, np.inf])}

    with pytest.raises(OcrnetError, match=r"after step 5, cls_head\.bias is not finite"):
        run_loop(Overflowing(), dataset, tmp_path / "out")
    assert list((tmp_path / "out/checkpoint").iterdir()) == []


def test_unreadable_images_are_logged_once_and_limited_in_number(dataset, tmp_path):
    class Reading(CountingEngine):
        errors: tuple = ("a.png is damaged",)

        def train(self, steps, stopped=lambda: False):
            return dataclasses.replace(super().train(steps), unreadable=self.errors)

    run, progress = run_loop(Reading(), dataset, tmp_path / "out")
    assert progress.unreadable == ["a.png is damaged"]
    assert run.log.read_text().count("a.png is damaged") == 1
    many = Reading()
    many.errors = ("a.png is damaged", "b.png is damaged")
    with pytest.raises(OcrnetError, match="2 of 3 training images are unreadable"):
        run_loop(many, dataset, tmp_path / "other")


def test_without_evaluation_nothing_is_evaluated(dataset, tmp_path):
    engine = CountingEngine()
    run, _ = run_loop(engine, dataset, tmp_path / "out", run_eval=False)
    assert engine.segments == [4, 1, 3, 2]
    assert {row["kind"] for row in rows(run)} == {"train"}


def test_durations_are_formatted():
    assert duration(59.6) == "0:01:00"
    assert duration(3723) == "1:02:03"
    assert duration(2 * 86400 + 5) == "2 d 0:00:05"
