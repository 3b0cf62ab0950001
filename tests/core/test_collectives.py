"""Several ranks, each a thread with its own loop: what they agree on, and that none waits for one that is gone."""

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
from ocrnet.engines import collectives
from ocrnet.engines.base import Stats
from ocrnet.evaluation.evaluator import evaluate
from ocrnet.evaluation.metrics import as_dict
from ocrnet.tracking import plots
from ocrnet.tracking.run_dir import Run
from ocrnet.train import dry_run as dry_run_module
from ocrnet.train import setup, trainer
from ocrnet.train.trainer import Loop, Progress
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

CONFIG = Config(
    num_classes=2, total_step=12, warmup_step=0, log_interval=6, save_interval=6, eval_interval=6, num_workers=0,
    batch_size=1, eval_samples=0, data=Data(crop_size=(64, 64)), ocr_head=OcrHead(channels=16, key_channels=8),
    backbone=Backbone(width=4, blocks=1, modules=(1, 1, 1)),
)  # fmt: skip

PATIENCE = 30  # seconds that a rank waits for another


class GoneError(Exception):
    """A rank waits in a collective for one that has ended."""


class Exchange:
    """What the ranks meet in. Two that are in different collectives, or one that waits in vain, is a fault."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.changed = threading.Condition()
        self.waiting: dict[int, tuple] = {}
        self.totals: list = []
        self.gone: set[int] = set()
        self.faults: list[str] = []

    def meet(self, rank: int, kind: tuple, array=0):
        with self.changed:
            turn = self.turn
            self.waiting[rank] = (kind, array)
            if len(self.waiting) == self.size:
                if len({kind for kind, _ in self.waiting.values()}) > 1:
                    self.faults.append(f"different collectives: {self.waiting}")
                self.totals.append(sum(array for _, array in self.waiting.values()))
                self.waiting, self.turn = {}, turn + 1
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn > turn or self.gone, PATIENCE)
            if self.turn == turn:
                raise GoneError(f"rank {rank} waits in {kind} for {self.gone or 'a rank that does not come'}")
            return self.totals[turn]

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


class RankEngine:
    """An engine of one rank whose weights count its steps; it answers with the image's own red channel."""

    startup_messages, versions = ("an engine of threads",), {"counting": "1"}

    def __init__(self, rank: int, exchange: Exchange, *, pace: float = 0.0, breaks: int | None = None) -> None:
        self.world, self.exchange = World(rank, exchange.size, rank, "threads"), exchange
        self.pace, self.breaks = pace, breaks
        self.step, self.looked, self.segments, self.sums = 0, 0, [], 0
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
                if self.step == self.breaks:
                    raise OcrnetError("b.png is damaged")
                self.exchange.meet(self.world.rank, ("step", self.step))
            except OcrnetError as error:
                self.failure = error
            except GoneError as error:
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
        return Stats(ones, ones[:, 0] > 0, taken, max(1e-3, self.pace * taken), 0.0, 2**30, errors)

    def predict(self, images, passes, outputs=("labels",)):
        self.looked += 1
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
            return self.exchange.meet(self.world.rank, ("sum", array.shape, array.dtype), array)
        except GoneError as error:
            self.exchange.faults.append(str(error))
            raise

    def close(self):
        pass


def on_ranks(size: int, work) -> list:
    """Run ``work(rank, exchange)`` on each rank; return what each returned or raised."""
    exchange, outcomes = Exchange(size), [None] * size

    def main(rank: int) -> None:
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
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a rank hangs"
    assert exchange.faults == []
    return outcomes


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Five images of two classes, of which a perfect answer is another part in each."""
    pairs = []
    for place, name in enumerate("abcde"):
        truth = np.zeros((40, 40), np.uint8)
        truth[: 5 + 3 * place] = 1
        image = np.repeat(truth[..., None], 3, axis=2)
        image[2 * place :, :7] = 0
        write_png(tmp_path / "data" / f"{name}.png", image)
        write_png(tmp_path / "data" / f"{name}_label.png", truth)
        pairs.append(Pair(name, tmp_path / "data" / f"{name}.png", tmp_path / "data" / f"{name}_label.png"))
    classes = ClassTable(("zero", "one"), ((0, 0, 0), (9, 9, 9)), (0, 1), frozenset({255}))
    return Dataset(classes, pairs, tmp_path)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(plots, "draw", lambda metrics, picture: None)


class Runs:
    """Loops over one shared run folder, and what is left of them."""

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


def asked_at(step: int, *, rank: int, number: int = 15):
    return lambda engine: number if engine.world.rank == rank and engine.step >= step else 0


# The exchanges themselves


def test_numbers_and_texts_of_all_ranks():
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


def test_one_rank_exchanges_nothing():
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


def test_ranks_that_see_different_things_are_told_which():
    outcomes = on_ranks(3, lambda rank, exchange: collectives.check_same(
        RankEngine(rank, exchange), {"seed": "7", "checkpoint": "step 4" if rank == 1 else "step 8"}
    ))  # fmt: skip
    for outcome in outcomes:
        assert "do not have the same checkpoint (ranks 0, 2: step 8; rank 1: step 4)" in str(outcome)


@pytest.mark.parametrize("error", [OcrnetError("mine"), MemoryError("mine")])
def test_what_fails_on_one_rank_ends_on_all(error):
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
def test_a_stop_on_one_rank_stops_all_at_one_step(runs, rank):
    outcomes = on_ranks(3, lambda r, exchange: runs.fit(r, exchange, stopped=asked_at(2, rank=rank)))
    assert outcomes == [15, 15, 15]
    assert [progress.step for progress in runs.progress] == [3, 3, 3]  # one step, then two, then the vote
    assert runs.saved == [3]
    found = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[0])
    assert found.tensors["test/count"].tolist() == [3]
    assert found.meta["cards"] == 3


def test_a_stop_after_the_last_step_is_everyones_too(runs):
    assert on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, stopped=asked_at(12, rank=1))) == [15, 15]
    assert runs.saved == [6, 12]


@pytest.mark.parametrize(
    ("paces", "segments"),
    [((0.01, 0.01), [1, 2, 4, 8, 5]), ((0.1, 2.4), [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]), ((9.0, 0.1), [1] * 20)],
)
def test_a_vote_comes_within_seconds_and_in_the_same_step_on_all(runs, paces, segments):
    def work(rank, exchange):
        def prepare(engine):
            engine.pace = paces[rank]

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


def test_unreadable_names_of_all_ranks_are_gathered(runs):
    def prepare(engine):
        engine.unreadable = {4: "b.png is damaged"} if engine.world.rank == 1 else {}

    data = dataclasses.replace(CONFIG.data, on_error="skip")
    outcomes = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare, data=data))
    assert outcomes == [0, 0]
    assert [progress.unreadable for progress in runs.progress] == [["b.png is damaged"]] * 2
    assert (runs.folder / "logs/train.log").read_text().count("b.png is damaged") == 1


def test_too_many_unreadable_images_on_all_ranks_together_end_all(runs):
    def prepare(engine):
        engine.unreadable = {4: f"{engine.world.rank}.png is damaged"}

    data = dataclasses.replace(CONFIG.data, on_error="skip")
    for outcome in on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare, data=data)):
        assert "2 of 5 training images are unreadable" in str(outcome)


def test_where_a_broken_image_ends_the_run_no_names_are_exchanged(runs, monkeypatch):
    monkeypatch.delattr(collectives, "gather_strings")
    assert on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange)) == [0, 0]


@pytest.mark.parametrize(
    ("what", "stop"), [("train", 99), ("eval", 99), ("checkpoint", 99), ("checkpoint", 1), ("curves", 99)]
)
def test_what_rank_0_cannot_write_ends_all(runs, monkeypatch, what, stop):
    def full(*args):
        raise OcrnetError("no space left")

    def record(run, row):
        if run.writes and row["kind"] == what:
            full()

    monkeypatch.setattr(Run, "record", record)
    if what == "checkpoint":
        monkeypatch.setattr(checkpoint, "save", full)
    if what == "curves":
        monkeypatch.setattr(Run, "draw_curves", lambda run: full() if run.writes else None)

    def work(rank, exchange):
        return runs.fit(rank, exchange, stopped=asked_at(stop, rank=1), run_eval=what == "eval")

    first, second = on_ranks(2, work)
    assert (str(first), str(second)[:13]) == ("no space left", "rank 0 failed")


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("step", [3, 5])  # first of a segment, and in its middle
def test_a_step_that_fails_on_one_rank(runs, broken, step):
    """The other may be in the middle of that step, where the engine ends it: nothing is exchanged any more."""

    def prepare(engine):
        engine.breaks = step if engine.world.rank == broken else None

    outcomes = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange, prepare=prepare))
    assert str(outcomes[broken]).startswith("b.png is damaged")
    assert str(outcomes[1 - broken]).startswith("lost a rank")
    assert f"step {step} is saved" in str(outcomes[0])
    assert "is saved" not in str(outcomes[1])  # it cannot know
    found = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[-1])
    assert (found.meta["step"], found.tensors["test/count"].tolist()) == (step, [step])


# Evaluation


def test_many_ranks_score_the_digits_of_one(dataset):
    def score(rank, exchange):
        return as_dict(evaluate(RankEngine(rank, exchange), dataset, CONFIG, eval_cfg=CONFIG.eval))

    (alone,) = on_ranks(1, score)
    assert 0.1 < alone["mean_iou"] < 0.95
    for size in (2, 3, 7):  # 7: two have no image
        assert on_ranks(size, score) == [alone] * size


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_in_the_middle_of_an_evaluation_abandons_it_on_all(runs, rank):
    def stopped(engine):
        return 2 if engine.world.rank == rank and engine.looked == 2 else 0

    assert on_ranks(2, lambda r, exchange: runs.fit(r, exchange, stopped=stopped)) == [2, 2]
    assert [(progress.step, progress.evaluated_step) for progress in runs.progress] == [(6, 0), (6, 0)]
    assert (runs.rows("eval"), runs.saved) == ([], [6])
    found = checkpoint.load(checkpoint.steps(runs.folder / "checkpoint")[0])
    assert on_ranks(
        2, lambda r, exchange: runs.fit(r, exchange, progress=Progress(**found.meta["progress"]))
    ) == [0, 0]  # fmt: skip
    assert [row["step"] for row in runs.rows("eval")] == [6, 12]


def test_an_unreadable_validation_image_of_one_rank_ends_all(runs):
    runs.dataset.path(1).write_bytes(b"no picture")
    first, second = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert "b.png" in str(second)
    assert str(first).startswith("rank 1 failed")
    assert all("step 6 is saved" in str(error) for error in (first, second))
    assert runs.saved == [6]


def test_no_rank_says_saved_where_rank_0_could_not_save(runs, monkeypatch):
    def full(path, *rest):
        raise OcrnetError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    runs.dataset.path(1).write_bytes(b"no picture")
    first, second = on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert "the finished steps cannot be saved either: no space left" in str(first)
    assert "the finished steps cannot be saved either: rank 0 failed" in str(second)


# The commands


class Commands:
    """`train`, `dry_run` and `eval` on ranks, with the engine of threads and five images in place of the real ones."""

    def __init__(self, dataset, folder, monkeypatch) -> None:
        self.cfg = dataclasses.replace(CONFIG, save_dir=str(folder))
        self.here = threading.local()
        for module in (setup, dry_run_module, eval_command):
            monkeypatch.setattr(module, "open_split", lambda cfg, split: dataset)
        for module in (setup, dry_run_module):
            monkeypatch.setattr(module, "open_engine", self.open_engine)
        monkeypatch.setattr("ocrnet.engines.factory.open_engine", self.open_engine)
        monkeypatch.setattr(common, "read_world", lambda: self.here.world)
        self.full = False

    def open_engine(self, cfg, arch, *, world, stream=None):
        engine = RankEngine(world.rank, self.here.exchange)
        if self.full and world.rank == 1:
            engine.restore = self.refuse
        return engine

    def refuse(self, state, step):
        raise OcrnetError("no memory")

    def enter(self, rank, exchange) -> World:
        self.here.exchange, self.here.world = exchange, World(rank, exchange.size)
        return self.here.world

    def train(self, rank, exchange, *, resume=None, **changes):
        world = self.enter(rank, exchange)
        setup.train(dataclasses.replace(self.cfg, **changes), notes=[], resume=resume, world=world)

    def dry_run(self, rank, exchange):
        return dry_run_module.dry_run(self.cfg, notes=[], world=self.enter(rank, exchange))

    def eval(self, rank, exchange, *argv):
        self.enter(rank, exchange)
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


def test_a_folder_that_rank_0_cannot_claim_ends_all(commands, monkeypatch):
    def refuse(run):
        if run.writes:
            raise OcrnetError("in use")

    monkeypatch.setattr(Run, "lock", refuse)
    first, second = on_ranks(2, commands.train)
    assert (str(first), str(second)[:13]) == ("in use", "rank 0 failed")


@pytest.mark.parametrize("name", ["train", "dry_run", "eval"])
def test_a_state_that_finds_no_room_on_one_rank_ends_all(commands, tmp_path, name):
    if name == "eval":
        on_ranks(2, commands.train)
    commands.full = True
    argv = ["--checkpoint_path", str(tmp_path / "out"), "--save_dir", str(tmp_path / "eval")] if name == "eval" else []
    first, second = on_ranks(2, lambda *rank: getattr(commands, name)(*rank, *argv))
    assert (str(first)[:13], str(second)) == ("rank 1 failed", "no memory")


def test_resuming_with_another_number_of_cards_is_said(commands, tmp_path):
    on_ranks(2, commands.train)
    assert on_ranks(3, lambda *rank: commands.train(*rank, resume="auto", total_step=15)) == [None] * 3
    said = (tmp_path / "out/logs/train.log").read_text()
    assert "resume: the number of ranks is 3, was 2: the global batch changes to 3 crops a step, was 2;" in said
    assert commands.cfg.batch_size == 1
    changes = {"resume": "auto", "total_step": 18, "batch_size": 3}
    assert on_ranks(1, lambda *rank: commands.train(*rank, **changes)) == [None]
    said = (tmp_path / "out/logs/train.log").read_text()
    assert "resume: the number of ranks is 1, was 3: the global batch is the same" in said


def test_a_checkpoint_from_before_cards_were_noted_had_one(tmp_path):
    config = {"batch_size": 4, "accumulate_steps": 1}
    old = checkpoint.Checkpoint(tmp_path, {}, {"config": config})
    changed = setup._changed_batch
    assert changed(dataclasses.replace(CONFIG, batch_size=4), old, World()) == []
    assert changed(dataclasses.replace(CONFIG, batch_size=2), old, World()) == [
        "resume: the global batch changes to 2 crops a step, was 4; the run will see a different number of crops"
    ]
    (line,) = changed(dataclasses.replace(CONFIG, batch_size=4), old, World(0, 2))
    assert line.startswith("resume: the number of ranks is 2, was 1: the global batch changes to 8")


def test_every_rank_ends_with_the_status_of_the_one_signal(commands, monkeypatch, capsys):
    class Asked(StopRequest):
        def __call__(self):
            return 0 if self.prints else 15  # ranks other than 0

    monkeypatch.setattr(setup, "StopRequest", Asked)
    outcomes = on_ranks(3, commands.train)
    assert [type(outcome) for outcome in outcomes] == [Stopped] * 3
    assert [outcome.status for outcome in outcomes] == [143, 143, 143]
    assert capsys.readouterr().out.count("stopped after step 0") == 1


def test_a_dry_run_is_printed_once_and_any_ranks_problem_counts(commands, monkeypatch, capsys):
    assert on_ranks(2, commands.dry_run) == [[], []]
    said = capsys.readouterr().out
    for text in ("dry run: nothing was written", "parameters: ", "time: ", "an engine of threads"):
        assert said.count(text) == 1, text

    def problem_on_rank_1(datasets, cfg):
        return ["seen"], ["b.png is damaged"] if commands.here.world.rank == 1 else []

    monkeypatch.setattr(dry_run_module, "lines_of_data", problem_on_rank_1)
    assert on_ranks(2, commands.dry_run) == [["b.png is damaged"], ["b.png is damaged"]]
    assert capsys.readouterr().out.count("problem: b.png is damaged") == 1

    def breaks_on_rank_1(datasets, cfg):
        if commands.here.world.rank == 1:
            raise OcrnetError("no folder")
        return [], []

    monkeypatch.setattr(dry_run_module, "lines_of_data", breaks_on_rank_1)
    first, second = on_ranks(2, commands.dry_run)
    assert (str(first)[:13], str(second)) == ("rank 1 failed", "no folder")


def test_an_evaluation_by_many_ranks_is_told_once(commands, tmp_path, capsys):
    on_ranks(2, commands.train)
    capsys.readouterr()
    tables = []
    for size in (1, 3):
        folder = tmp_path / f"eval{size}"
        argv = ("--checkpoint_path", str(tmp_path / "out"), "--save_dir", str(folder), "--set", "min_miou=0.99")
        assert on_ranks(size, lambda *rank: commands.eval(*rank, *argv)) == [1] * size  # noqa: B023
        said = capsys.readouterr().out
        tables.append(said[said.index("class") :])
        assert len((folder / "eval.jsonl").read_text().splitlines()) == 1
    assert tables[0] == tables[1]


def test_ranks_that_would_score_different_checkpoints_end(commands, tmp_path):
    on_ranks(1, commands.train)
    argv = ("--save_dir", str(tmp_path / "eval"), "--checkpoint_path")
    paths = [str(path) for path in checkpoint.steps(tmp_path / "out/checkpoint")]
    for outcome in on_ranks(2, lambda *rank: commands.eval(*rank, *argv, paths[rank[0]])):
        assert "do not have the same checkpoint" in str(outcome)
    assert not (tmp_path / "eval").exists()


def test_an_error_names_its_rank_where_there_are_several(monkeypatch, capsys):
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
def test_one_rank_tells_of_a_signal(speaks, capfd):
    with StopRequest(prints=speaks) as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped() == signal.SIGTERM
    assert ("SIGTERM: stopping" in capfd.readouterr().err) == speaks


def test_many_ranks_show_no_bar(runs, monkeypatch):
    asked = []

    class Bar(trainer.ProgressBar):
        def __init__(self, *args, shown=None):
            asked.append(shown)
            super().__init__(*args, shown=False)

    monkeypatch.setattr(trainer, "ProgressBar", Bar)
    on_ranks(2, lambda rank, exchange: runs.fit(rank, exchange))
    assert asked == [False, False]
