"""Several ranks, each a thread with its own loop: what they agree on, and that none waits for a rank that has ended."""

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ocrnet.cli import common, main
from ocrnet.cli import eval as eval_command
from ocrnet.config import Backbone, Config, Data, OcrHead
from ocrnet.data.datasets.base import ClassTable, Dataset, Pair
from ocrnet.data.image_io import write_png
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines import collectives, factory
from ocrnet.engines.base import Stats
from ocrnet.evaluation.evaluator import evaluate
from ocrnet.evaluation.metrics import as_dict
from ocrnet.tracking import plots
from ocrnet.tracking.run_dir import Run
from ocrnet.train import dry_run as dry_run_module
from ocrnet.train import setup, trainer
from ocrnet.train.trainer import Loop, Progress
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

CONFIG = Config(
    num_classes=2, total_step=12, warmup_step=0, log_interval=6, save_interval=6, eval_interval=6, num_workers=0,
    batch_size=1, eval_samples=0, data=Data(crop_size=(64, 64)), ocr_head=OcrHead(channels=16, key_channels=8),
    backbone=Backbone(width=4, blocks=1, modules=(1, 1, 1)),
)  # fmt: skip

RANK_TIMEOUT = 30  # seconds that a rank waits for another


class LostRankError(Exception):
    """A rank waits in a collective for a rank that has ended."""


class Exchange:
    """The collectives of ranks that are threads.

    `errors` lists misuse: ranks in different collectives, or a sum that waits for a rank that has ended.
    """

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.changed = threading.Condition()
        self.waiting: dict[int, tuple] = {}
        self.totals: list = []
        self.ended: set[int] = set()
        self.errors: list[str] = []

    def all_reduce(self, rank: int, kind: tuple, array=0):
        with self.changed:
            turn = self.turn
            self.waiting[rank] = (kind, array)
            if len(self.waiting) == self.size:
                if len({kind for kind, _ in self.waiting.values()}) > 1:
                    self.errors.append(f"different collectives: {self.waiting}")
                self.totals.append(sum(array for _, array in self.waiting.values()))
                self.waiting, self.turn = {}, turn + 1
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn > turn or self.ended, RANK_TIMEOUT)
            if self.turn == turn:
                raise LostRankError(f"rank {rank} waits in {kind} for {self.ended or 'a rank that does not arrive'}")
            return self.totals[turn]

    def leave(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


class RankEngine:
    """An engine of one rank whose weights count its steps; it predicts the red channel of the image."""

    startup_messages, versions = ("an engine of threads",), {"counting": "1"}

    def __init__(
        self, rank: int, exchange: Exchange, *, seconds_per_step: float = 0.0, failing_step: int | None = None
    ) -> None:
        self.world, self.exchange = World(rank, exchange.size, rank, "threads"), exchange
        self.seconds_per_step, self.failing_step = seconds_per_step, failing_step
        self.step, self.predicted, self.segments, self.sums = 0, 0, [], 0
        self.unreadable: dict[int, str] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.failure: OcrnetError | None = None

    def train(self, steps: int, stopped=None) -> Stats:
        assert stopped is None or self.world.size == 1
        if self.failure:
            raise self.failure
        begun = self.step
        for _ in range(steps):
            try:
                if self.step == self.failing_step:
                    raise OcrnetError("b.png is damaged")
                self.exchange.all_reduce(self.world.rank, ("step", self.step))
            except OcrnetError as error:
                self.failure = error
            except LostRankError as error:
                self.failure = OcrnetError(f"lost a rank: {error}")
            if self.failure and self.step == begun:
                raise self.failure
            if self.failure:
                break
            self.step += 1
        taken = self.step - begun
        self.segments.append(taken)
        errors = tuple(error for step, error in self.unreadable.items() if begun <= step < self.step)
        ones = np.ones((taken, 2))
        return Stats(ones, ones[:, 0] > 0, taken, max(1e-3, self.seconds_per_step * taken), 0.0, 2**30, errors)

    def predict(self, images, passes, outputs=("labels",)):
        self.predicted += 1
        return {"labels": images[..., 0].copy()}

    def state(self):
        return self.tensors | {"test/count": np.array([self.step])}

    def restore(self, state, step):
        self.tensors, self.step = {name: array for name, array in state.items() if name != "test/count"}, step

    def sum(self, array):
        self.sums += 1
        if self.world.size == 1:
            return array
        try:
            return self.exchange.all_reduce(self.world.rank, ("sum", array.shape, array.dtype), array)
        except LostRankError as error:
            self.exchange.errors.append(str(error))
            raise

    def close(self):
        pass


def on_ranks(size: int, work) -> list:
    """Run ``work(rank, exchange)`` on each rank, with one console for all; return what each returned or raised."""
    log.open_console()
    exchange, outcomes = Exchange(size), [None] * size

    def main(rank: int) -> None:
        log.set_rank(rank, first_of_machine=rank == 0)
        try:
            outcomes[rank] = work(rank, exchange)
        except Exception as error:
            outcomes[rank] = error
        finally:
            exchange.leave(rank)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * RANK_TIMEOUT)
        assert not thread.is_alive(), "a rank hangs"
    assert exchange.errors == []
    return outcomes


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Five images of two classes; class 1 covers another part of each label."""
    pairs = []
    for place, name in enumerate("abcde"):
        label = np.zeros((40, 40), np.uint8)
        label[: 5 + 3 * place] = 1
        image = np.repeat(label[..., None], 3, axis=2)
        image[2 * place :, :7] = 0
        write_png(tmp_path / "data" / f"{name}.png", image)
        write_png(tmp_path / "data" / f"{name}_label.png", label)
        pairs.append(Pair(name, tmp_path / "data" / f"{name}.png", tmp_path / "data" / f"{name}_label.png"))
    classes = ClassTable(("zero", "one"), ((0, 0, 0), (9, 9, 9)), (0, 1), frozenset({255}))
    return Dataset(classes, pairs, tmp_path)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Draw no curves, as drawing takes longer than everything else in these tests."""
    monkeypatch.setattr(plots, "draw", lambda metrics, image: None)


class Runs:
    """Runs loops of several ranks over one shared run folder, and reads what they wrote."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self.engines: dict[int, RankEngine] = {}
        self.loops: dict[int, Loop] = {}

    def fit(self, rank, exchange, *, stopped=lambda engine: 0, progress=None, prepare=lambda engine: None, **changes):
        cfg = dataclasses.replace(CONFIG, save_dir=str(self.folder), **changes)
        engine = self.engines[rank] = RankEngine(rank, exchange)
        prepare(engine)
        run = Run(self.folder, rank=rank)
        run.begin(cfg, {})
        run.open_log()
        stream = TrainStream(self.dataset, cfg.data, seed=cfg.seed, channels=4, dropout=0.0)
        progress = progress or Progress()
        engine.step = progress.step
        val_set = self.dataset if cfg.run_eval else None
        self.loops[rank] = Loop(cfg, engine, run, stream, val_set, progress, lambda: stopped(engine))
        return self.loops[rank].fit()

    @property
    def progress(self) -> list[Progress]:
        return [self.loops[rank].progress for rank in sorted(self.loops)]

    @property
    def saved(self) -> list[int | None]:
        return [checkpoint.step_of(path) for path in checkpoint.steps(self.folder / "checkpoint")]

    def rows(self, kind: str) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture
def runs(dataset, tmp_path) -> Runs:
    return Runs(dataset, tmp_path / "out")


def stop_signal_at(step: int, *, rank: int, number: int = 15):
    return lambda engine: number if engine.world.rank == rank and engine.step >= step else 0


# The collectives themselves


def test_numbers_and_strings_of_all_ranks_are_gathered():
    texts = (["ä.png is damaged", "b"], [], ["\udcff.png"])

    def work(rank, exchange):
        engine = RankEngine(rank, exchange)
        return (
            collectives.all_gather(engine, 10 + rank),
            collectives.all_reduce_max(engine, 0),
            collectives.all_reduce_max(engine, 2 if rank == 1 else 0),
            collectives.gather_strings(engine, texts[rank]),
            collectives.gather_strings(engine, []),
        )

    for outcome in on_ranks(3, work):
        assert outcome == ([10, 11, 12], 0, 2, list(texts), [[], [], []])


def test_a_single_rank_communicates_nothing():
    engine = RankEngine(0, Exchange(1))
    assert (
        collectives.all_gather(engine, 3),
        collectives.all_reduce_max(engine, 2),
        collectives.gather_strings(engine, ["a"]),
    ) == (
        [3],
        2,
        [["a"]],
    )
    collectives.check_same(engine, {"checkpoint": "step 1"})
    with pytest.raises(OcrnetError, match="mine"), collectives.propagate_errors(engine):
        raise OcrnetError("mine")
    assert engine.sums == 0


def test_values_that_differ_are_reported_by_rank():
    outcomes = on_ranks(3, lambda rank, exchange: collectives.check_same(
        RankEngine(rank, exchange), {"seed": "7", "checkpoint": "step 4" if rank == 1 else "step 8"}
    ))  # fmt: skip
    for outcome in outcomes:
        assert "do not have the same checkpoint (ranks 0, 2: step 8; rank 1: step 4)" in str(outcome)


@pytest.mark.parametrize("error", [OcrnetError("mine"), MemoryError("mine")])
def test_an_exception_on_one_rank_is_raised_on_all(error):
    def work(rank, exchange):
        with collectives.propagate_errors(RankEngine(rank, exchange)):
            if rank == 1:
                raise error

    first, second, third = on_ranks(3, work)
    assert second is error
    for other in (first, third):
        assert isinstance(other, OcrnetError)
        assert str(other).startswith("rank 1 failed")


# Training


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_on_one_rank_stops_all_ranks_at_the_same_step(runs, rank):
    outcomes = on_ranks(3, lambda r, exchange: runs.fit(r, exchange, stopped=stop_signal_at(2, rank=rank)))
    assert outcomes == [15, 15, 15]
    # The ranks agree to stop after segments of one and of two steps.
    assert [progress.step for progress in runs.progress] == [3, 3, 3]
    assert runs.saved == [3]
    saved = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[0])
    assert saved.tensors["test/count"].tolist() == [3]
    assert saved.meta["cards"] == 3


def test_a_stop_after_the_last_step_reaches_all_ranks(runs):
    assert on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, stopped=stop_signal_at(12, rank=1))) == [15, 15]
    assert runs.saved == [6, 12]


@pytest.mark.parametrize(
    ("seconds_per_step", "segments"),
    [((0.01, 0.01), [1, 2, 4, 8, 5]), ((0.1, 2.4), [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]), ((9.0, 0.1), [1] * 20)],
)
def test_segment_lengths_follow_the_slowest_rank_and_are_equal_on_all(runs, seconds_per_step, segments):
    def work(rank, exchange):
        def prepare(engine):
            engine.seconds_per_step = seconds_per_step[rank]

        return runs.fit(rank, exchange, prepare=prepare, total_step=20, log_interval=20, save_interval=20,
                        eval_interval=20)  # fmt: skip

    assert on_ranks(2, work) == [0, 0]
    assert [runs.engines[rank].segments for rank in (0, 1)] == [segments, segments]


def test_only_rank_0_writes_and_each_file_once(runs, monkeypatch, capsys):
    saved, pruned, save, prune = [], [], checkpoint.save, checkpoint.prune
    monkeypatch.setattr(checkpoint, "save", lambda path, *rest: (saved.append(Path(path).name), save(path, *rest)))
    monkeypatch.setattr(checkpoint, "prune", lambda *args: pruned.append(prune(*args)))
    assert on_ranks(3, lambda rank, exchange: runs.fit(rank, exchange)) == [0, 0, 0]
    assert saved == [checkpoint.file_name(4, tag) for tag in ("best", 6, 12)]
    assert len(pruned) == 2
    assert [row["step"] for row in runs.rows("train")] == [row["step"] for row in runs.rows("eval")] == [6, 12]
    assert capsys.readouterr().out.count("step 12/12 ") == 1
    assert runs.progress[0] == runs.progress[1] == runs.progress[2]


def test_unreadable_images_of_all_ranks_are_gathered(runs):
    def prepare(engine):
        engine.unreadable = {4: "b.png is damaged"} if engine.world.rank == 1 else {}

    data = dataclasses.replace(CONFIG.data, on_error="skip")
    outcomes = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare, data=data))
    assert outcomes == [0, 0]
    assert [progress.unreadable for progress in runs.progress] == [["b.png is damaged"]] * 2
    assert (runs.folder / "logs/train.log").read_text().count("b.png is damaged") == 1


def test_too_many_unreadable_images_over_all_ranks_end_the_run(runs):
    def prepare(engine):
        engine.unreadable = {4: f"{engine.world.rank}.png is damaged"}

    data = dataclasses.replace(CONFIG.data, on_error="skip")
    for outcome in on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare, data=data)):
        assert "2 of 5 training images are unreadable" in str(outcome)


def test_unreadable_images_are_not_gathered_if_the_first_one_ends_the_run(runs, monkeypatch):
    monkeypatch.delattr(collectives, "gather_strings")
    assert on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange)) == [0, 0]


@pytest.mark.parametrize(
    ("failing", "stop"), [("train", 99), ("eval", 99), ("checkpoint", 99), ("checkpoint", 1), ("curves", 99)]
)
def test_a_failed_write_on_rank_0_ends_all_ranks(runs, monkeypatch, failing, stop):
    def full(*args):
        raise OcrnetError("no space left")

    def record(run, row):
        if run.writes and row["kind"] == failing:
            full()

    monkeypatch.setattr(Run, "record", record)
    if failing == "checkpoint":
        monkeypatch.setattr(checkpoint, "save", full)
    if failing == "curves":
        monkeypatch.setattr(Run, "draw_curves", lambda run: full() if run.writes else None)

    def work(rank, exchange):
        return runs.fit(rank, exchange, stopped=stop_signal_at(stop, rank=1), run_eval=failing == "eval")

    first, second = on_ranks(2, work)
    assert (str(first), str(second)[:13]) == ("no space left", "rank 0 failed")


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("step", [3, 5])  # the first of a segment, and one within it
def test_a_step_that_fails_on_one_rank_ends_all_ranks(runs, broken, step):
    """The other rank may be within that step, where its engine raises an error; the ranks run no further collective."""

    def prepare(engine):
        engine.failing_step = step if engine.world.rank == broken else None

    outcomes = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare))
    assert str(outcomes[broken]).startswith("b.png is damaged")
    assert str(outcomes[1 - broken]).startswith("lost a rank")
    assert f"step {step} is saved" in str(outcomes[0])
    assert "is saved" not in str(outcomes[1])  # rank 1 does not know whether rank 0 saved
    saved = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[-1])
    assert (saved.meta["step"], saved.tensors["test/count"].tolist()) == (step, [step])


# Evaluation


def test_scores_are_identical_for_any_number_of_ranks(dataset):
    def score(rank, exchange):
        return as_dict(evaluate(RankEngine(rank, exchange), dataset, CONFIG, eval_cfg=CONFIG.eval))

    (single,) = on_ranks(1, score)
    assert 0.1 < single["mean_iou"] < 0.95
    for size in (2, 3, 7):  # with 7 ranks, two have no image
        assert on_ranks(size, score) == [single] * size


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_during_an_evaluation_abandons_it_on_all_ranks(runs, rank):
    def stopped(engine):
        return 2 if engine.world.rank == rank and engine.predicted == 2 else 0

    assert on_ranks(2, lambda r, exchange: runs.fit(r, exchange, stopped=stopped)) == [2, 2]
    assert [(progress.step, progress.evaluated_step) for progress in runs.progress] == [(6, 0), (6, 0)]
    assert (runs.rows("eval"), runs.saved) == ([], [6])
    saved = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[0])
    assert on_ranks(
        2, lambda r, exchange: runs.fit(r, exchange, progress=Progress(**saved.meta["progress"]))
    ) == [0, 0]  # fmt: skip
    assert [row["step"] for row in runs.rows("eval")] == [6, 12]


def test_an_unreadable_validation_image_of_one_rank_ends_all_ranks(runs):
    runs.dataset.path(1).write_bytes(b"no image")
    first, second = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert "b.png" in str(second)
    assert str(first).startswith("rank 1 failed")
    assert all("step 6 is saved" in str(error) for error in (first, second))
    assert runs.saved == [6]


def test_no_rank_reports_a_checkpoint_that_rank_0_could_not_save(runs, monkeypatch):
    def full(path, *rest):
        raise OcrnetError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    runs.dataset.path(1).write_bytes(b"no image")
    first, second = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert "the finished steps cannot be saved either: no space left" in str(first)
    assert "the finished steps cannot be saved either: rank 0 failed" in str(second)


# The commands


class Commands:
    """`train`, `dry_run` and `eval` on ranks, with `RankEngine` and five images as engine and dataset."""

    def __init__(self, dataset, folder, monkeypatch) -> None:
        self.cfg = dataclasses.replace(CONFIG, save_dir=str(folder))
        self.thread = threading.local()
        for module in (setup, dry_run_module, eval_command):
            monkeypatch.setattr(module, "open_split", lambda cfg, split: dataset)
        for module in (setup, dry_run_module):
            monkeypatch.setattr(module, "open_engine", self.open_engine)
        monkeypatch.setattr("ocrnet.engines.factory.open_engine", self.open_engine)
        monkeypatch.setattr(common, "read_world", lambda: self.thread.world)
        close_file = log.close_file  # all ranks share the log file, so only rank 0 may close it
        monkeypatch.setattr(log, "close_file", lambda: close_file() if self.thread.world.rank == 0 else None)
        self.restore_fails = False

    def open_engine(self, cfg, arch, *, world, stream=None):
        engine = RankEngine(world.rank, self.thread.exchange)
        if self.restore_fails and world.rank == 1:
            engine.restore = self.fail_restore
        factory.log_startup(engine)
        return engine

    def fail_restore(self, state, step):
        raise OcrnetError("no memory")

    def set_world(self, rank, exchange) -> World:
        self.thread.exchange, self.thread.world = exchange, World(rank, exchange.size)
        return self.thread.world

    def train(self, rank, exchange, *, resume=None, **changes):
        world = self.set_world(rank, exchange)
        setup.train(dataclasses.replace(self.cfg, **changes), resume=resume, world=world)

    def dry_run(self, rank, exchange):
        return dry_run_module.dry_run(self.cfg, world=self.set_world(rank, exchange))

    def eval(self, rank, exchange, *argv):
        self.set_world(rank, exchange)
        return eval_command.main(["--config", "config/ocrnet/config_ocrnet_hrw18_8k.yml", *argv])


@pytest.fixture
def commands(dataset, tmp_path, monkeypatch) -> Commands:
    return Commands(dataset, tmp_path / "out", monkeypatch)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_ranks_that_would_resume_from_different_steps_end_before_anything_is_written(commands, tmp_path):
    assert on_ranks(2, commands.train) == [None, None]
    left = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    folders = (tmp_path / "out", tmp_path / "not shared")

    def resume(rank, exchange):
        commands.train(rank, exchange, resume="auto", save_dir=str(folders[rank]), total_step=20)

    for outcome in on_ranks(2, resume):
        assert "(rank 0: step 12, sha256 " in str(outcome)
        assert "; rank 1: none)" in str(outcome)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == left


def test_a_folder_that_rank_0_cannot_claim_ends_all_ranks(commands, monkeypatch):
    def refuse(run):
        if run.writes:
            raise OcrnetError("in use")

    monkeypatch.setattr(Run, "lock", refuse)
    first, second = on_ranks(2, commands.train)
    assert (str(first), str(second)[:13]) == ("in use", "rank 0 failed")


@pytest.mark.parametrize("name", ["train", "dry_run", "eval"])
def test_a_state_that_one_rank_cannot_restore_ends_all_ranks(commands, tmp_path, name):
    if name == "eval":
        on_ranks(2, commands.train)
    commands.restore_fails = True
    argv = ["--checkpoint_path", str(tmp_path / "out"), "--save_dir", str(tmp_path / "eval")] if name == "eval" else []
    first, second = on_ranks(2, lambda *rank: getattr(commands, name)(*rank, *argv))
    assert (str(first)[:13], str(second)) == ("rank 1 failed", "no memory")


def test_resuming_with_another_number_of_ranks_is_logged(commands, tmp_path):
    on_ranks(2, commands.train)
    assert on_ranks(3, lambda *rank: commands.train(*rank, resume="auto", total_step=15)) == [None] * 3
    log = (tmp_path / "out/logs/train.log").read_text()
    assert "resume: the number of ranks is 3, was 2: the global batch changes to 3 crops a step, was 2;" in log
    assert commands.cfg.batch_size == 1
    changes = {"resume": "auto", "total_step": 18, "batch_size": 3}
    assert on_ranks(1, lambda *rank: commands.train(*rank, **changes)) == [None]
    log = (tmp_path / "out/logs/train.log").read_text()
    assert "resume: the number of ranks is 1, was 3: the global batch is the same" in log


def test_a_checkpoint_without_a_number_of_ranks_counts_as_one_rank(tmp_path, caplog):
    config = {"batch_size": 4, "accumulate_steps": 1}
    old = checkpoint.Checkpoint(tmp_path, {}, {"config": config})

    def messages(batch_size: int, world: World) -> list[str]:
        caplog.clear()
        setup._log_changed_batch(dataclasses.replace(CONFIG, batch_size=batch_size), old, world)
        return caplog.messages

    assert messages(4, World()) == []
    assert messages(2, World()) == [
        "resume: the global batch changes to 2 crops a step, was 4; the run will see a different number of crops"
    ]
    (line,) = messages(4, World(0, 2))
    assert line.startswith("resume: the number of ranks is 2, was 1: the global batch changes to 8")


def test_every_rank_ends_with_the_exit_status_of_the_signal(commands, monkeypatch, capsys):
    class SignalOnOtherRanks(StopRequest):
        def __call__(self):
            return 0 if self.prints else 15  # the signal arrives on every rank but 0

    monkeypatch.setattr(setup, "StopRequest", SignalOnOtherRanks)
    outcomes = on_ranks(3, commands.train)
    assert [type(outcome) for outcome in outcomes] == [Stopped] * 3
    assert [outcome.status for outcome in outcomes] == [143, 143, 143]
    assert capsys.readouterr().out.count("stopped after step 0") == 1


def test_a_dry_run_is_printed_once_and_reports_problems_of_all_ranks(commands, monkeypatch, capsys):
    assert on_ranks(2, commands.dry_run) == [[], []]
    output = capsys.readouterr().out
    for text in ("dry run: nothing was written", "parameters: ", "time: ", "an engine of threads"):
        assert output.count(text) == 1, text

    def problem_on_rank_1(datasets, cfg):
        return ["data"], ["b.png is damaged"] if commands.thread.world.rank == 1 else []

    monkeypatch.setattr(dry_run_module, "data_lines", problem_on_rank_1)
    assert on_ranks(2, commands.dry_run) == [["b.png is damaged"], ["b.png is damaged"]]
    assert capsys.readouterr().out.count("problem: b.png is damaged") == 1

    def breaks_on_rank_1(datasets, cfg):
        if commands.thread.world.rank == 1:
            raise OcrnetError("no folder")
        return [], []

    monkeypatch.setattr(dry_run_module, "data_lines", breaks_on_rank_1)
    first, second = on_ranks(2, commands.dry_run)
    assert (str(first)[:13], str(second)) == ("rank 1 failed", "no folder")


def test_an_evaluation_by_several_ranks_is_printed_once(commands, tmp_path, capsys):
    on_ranks(2, commands.train)
    capsys.readouterr()
    tables = []
    for size in (1, 3):
        folder = tmp_path / f"eval{size}"
        argv = ("--checkpoint_path", str(tmp_path / "out"), "--save_dir", str(folder), "--set", "min_miou=0.99")
        assert on_ranks(size, lambda *rank: commands.eval(*rank, *argv)) == [1] * size  # noqa: B023
        output = capsys.readouterr().out
        tables.append(output[output.index("class") :])
        assert len((folder / "eval.jsonl").read_text().splitlines()) == 1
    assert tables[0] == tables[1]


def test_ranks_with_different_checkpoints_to_score_end(commands, tmp_path):
    on_ranks(1, commands.train)
    argv = ("--save_dir", str(tmp_path / "eval"), "--checkpoint_path")
    paths = [str(path) for path in checkpoint.steps(tmp_path / "out/checkpoint")]
    for outcome in on_ranks(2, lambda *rank: commands.eval(*rank, *argv, paths[rank[0]])):
        assert "do not have the same checkpoint" in str(outcome)
    assert not (tmp_path / "eval").exists()


def test_an_error_names_its_rank_if_there_are_several(monkeypatch, capsys):
    assert main.main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main.main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: rank 3: unknown command")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "4")
    assert main.main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command")


@pytest.mark.parametrize("speaks", [True, False])
def test_only_one_rank_prints_that_a_signal_arrived(speaks, capfd):
    with StopRequest(prints=speaks) as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped() == signal.SIGTERM
    assert ("SIGTERM: stopping" in capfd.readouterr().err) == speaks


def test_several_ranks_show_no_progress_bar(runs, monkeypatch):
    shown_arguments = []

    class Bar(trainer.ProgressBar):
        def __init__(self, *args, shown=None):
            shown_arguments.append(shown)
            super().__init__(*args, shown=False)

    monkeypatch.setattr(trainer, "ProgressBar", Bar)
    on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert shown_arguments == [False, False]
