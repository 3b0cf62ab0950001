"""The GeneratorDataset around the stream: the same bytes for any number of workers and ranks, from any step on."""

import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque

import mindspore
import mindspore.dataset
import numpy as np
import psutil
import pytest
from mindspore import nn

from ocrnet.config import Config, Data
from ocrnet.data.datasets import cache, open_dataset, synthetic
from ocrnet.data.sampler import Sample, TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.mindspore.dataloader import batches
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import SIGNALS, StopRequest

ALONE = World()
CONFIG = Config(batch_size=2, total_step=6, data=Data(crop_size=(48, 64)))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TrainStream:
    root = tmp_path_factory.mktemp("scenes") / "data"
    synthetic.write(root, train=5, val=0, test=0, size=(64, 128), seed=1)
    return TrainStream(open_dataset("cityscapes", root, "train"), CONFIG.data, seed=9, channels=32, dropout=0.1)


class Altered:
    """A stream whose samples pass through ``change(number, sample)``."""

    def __init__(self, stream, change) -> None:
        self.stream, self.change, self.channels = stream, change, stream.channels

    def __getitem__(self, number: int) -> Sample:
        return self.change(number, self.stream[number])


def digest(batch) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in batch[:3])).hexdigest()


def digests(stream, *, workers=0, step=0, world=ALONE, **changes) -> list[str]:
    cfg = dataclasses.replace(CONFIG, num_workers=workers, **changes)
    return [digest(batch) for batch in batches(stream, cfg, world=world, step=step)]


def begin_endless(stream, workers, **changes):
    """Return batches that do not end for long, after the first, and the workers that make them."""
    others = set(psutil.Process().children())
    cfg = dataclasses.replace(CONFIG, num_workers=workers, total_step=100_000, **changes)
    made = batches(stream, cfg, world=ALONE, step=0)
    next(made)
    return made, [child for child in psutil.Process().children() if child not in others]


def left() -> tuple[int, int, int]:
    run = psutil.Process()
    return len(run.children(recursive=True)), run.num_threads(), run.num_fds()


def assert_nothing_is_left_but(before) -> None:
    end = time.monotonic() + 10
    while any(now > then for now, then in zip(left(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.05)  # a thread's last moments
    assert all(now <= then for now, then in zip(left(), before, strict=True)), (left(), before)


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_any_number_of_workers_gives_the_same_bytes(stream, workers):
    wanted = digests(stream)
    assert len(wanted) == 6
    assert digests(stream, workers=workers) == wanted
    assert len(set(wanted)) == 6


def test_workers_that_build_and_use_a_cache_give_the_same_bytes(stream, tmp_path):
    sets, _ = cache.prepare(str(tmp_path / "cache"), {"images": stream.dataset})
    kept = TrainStream(sets["images"], CONFIG.data, seed=9, channels=32, dropout=0.1)
    wanted = digests(stream)
    assert digests(kept, workers=2) == wanted
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert digests(kept, workers=2) == wanted


@pytest.mark.parametrize("prefetch", [1, 3, 100])
def test_the_queues_hold_what_they_should(stream, prefetch):
    wanted = digests(stream, total_step=40)
    for workers in (1, 4, 6):
        assert digests(stream, workers=workers, prefetch_size=prefetch, total_step=40) == wanted


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_started_anywhere_the_stream_goes_on(stream, workers, step):
    assert digests(stream, workers=workers, step=step) == digests(stream)[step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_give_one_ranks_bytes(stream, ranks, workers):
    cfg = dataclasses.replace(CONFIG, batch_size=2 * ranks, num_workers=0)
    alone = batches(stream, cfg, world=World(), step=0)
    part = dataclasses.replace(CONFIG, num_workers=workers)
    shares = [batches(stream, part, world=World(rank, ranks), step=0) for rank in range(ranks)]
    for whole, *parts in itertools.zip_longest(alone, *shares):
        for field in range(3):
            assert np.array_equal(whole[field], np.concatenate([part[field] for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_are_the_whole_batch_cut_up(stream, workers):
    cut_up = digests(stream, workers=workers, batch_size=2, accumulate_steps=3)
    assert cut_up == digests(stream, batch_size=2, total_step=18)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_doors_shapes_and_types(stream, workers):
    cfg = dataclasses.replace(CONFIG, num_workers=workers)
    images, labels, keeps, unreadable = next(batches(stream, cfg, world=World(), step=0))
    assert (images.shape, images.dtype) == ((2, 48, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((2, 48, 64), np.uint8)
    assert (keeps.shape, keeps.dtype) == ((2, 32), np.bool_)
    assert unreadable == ()


def test_a_batch_is_its_holders_for_good(stream):
    made, _ = begin_endless(stream, 2)
    held = list(itertools.islice(made, 30))
    made.close()
    alone = batches(stream, dataclasses.replace(CONFIG, num_workers=0, total_step=31), world=ALONE, step=1)
    assert [digest(batch) for batch in held] == [digest(batch) for batch in alone]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_dtype_of_an_image_is_kept_also_where_it_needs_more_memory(stream, workers):
    def poison(number, sample):
        return sample._replace(image=np.where(sample.image > 99, np.inf, sample.image).astype(np.float32))

    data = dataclasses.replace(CONFIG.data, crop_size=(512, 512))  # float32: 6 MB of the 4 that a row has
    large = TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1)
    cfg = dataclasses.replace(CONFIG, num_workers=workers, data=data, total_step=3)
    for batch, plain in zip(
        batches(Altered(large, poison), cfg, world=ALONE, step=0),
        batches(large, dataclasses.replace(cfg, num_workers=0), world=ALONE, step=0),
        strict=True,
    ):
        assert batch.images.dtype == np.float32
        assert np.array_equal(batch.images, np.where(plain.images > 99, np.inf, plain.images))
        assert np.array_equal(batch.labels, plain.labels)


@pytest.mark.parametrize("max_rowsize", [2, 16])
def test_a_large_crop_comes_whole(stream, max_rowsize):
    data = dataclasses.replace(CONFIG.data, crop_size=(512, 1020))  # 2 MB less a little
    large = TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1)
    found = {
        workers: digests(large, workers=workers, max_rowsize=max_rowsize, data=data, batch_size=8, total_step=3)
        for workers in (0, 2)
    }
    assert found[0] == found[2]


def test_a_sample_above_max_rowsize_is_told_at_once_with_the_value_it_needs(stream):
    data = dataclasses.replace(CONFIG.data, crop_size=(512, 1024))
    cfg = dataclasses.replace(CONFIG, data=data, max_rowsize=1, num_workers=1)
    with pytest.raises(OcrnetError, match=r"\[512, 1024\] takes 3 MB but max_rowsize is 1; set max_rowsize: 3 "):
        batches(stream, cfg, world=ALONE, step=0)
    batches(stream, dataclasses.replace(cfg, max_rowsize=3), world=ALONE, step=0)
    batches(stream, dataclasses.replace(cfg, num_workers=0), world=ALONE, step=0)


def test_more_memory_than_there_is_is_told(stream):
    with pytest.raises(OcrnetError, match=r"(?s)Insufficient shared memory.*; .*lower num_workers or prefetch_size"):
        begin_endless(stream, 1, prefetch_size=10**7)
    assert digests(stream, workers=1) == digests(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named(stream, tmp_path, workers):
    synthetic.write(tmp_path / "data", train=2, val=0, test=0, size=(64, 128), seed=1)
    dataset = open_dataset("cityscapes", tmp_path / "data", "train")
    victim = dataset.pairs[1].image
    victim.write_bytes(victim.read_bytes()[:200])
    broken = TrainStream(dataset, CONFIG.data, seed=9, channels=32, dropout=0.1)
    with pytest.raises(OcrnetError, match=victim.name) as told:
        digests(broken, workers=workers)
    with pytest.raises(OcrnetError) as wanted:
        dataset.read(1)
    assert str(told.value) == str(wanted.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_passed_over_are_told(stream, workers):
    def some(number, sample):
        return sample._replace(unreadable=(f'file {number}: \N{SNOWMAN} "quoted"',) * (number % 3))

    cfg = dataclasses.replace(CONFIG, num_workers=workers, batch_size=3, total_step=2)
    made = list(batches(Altered(stream, some), cfg, world=ALONE, step=0))
    one, two, four, five = (f'file {number}: \N{SNOWMAN} "quoted"' for number in (1, 2, 4, 5))
    assert [batch.unreadable for batch in made] == [(one, two, two), (four, five, five)]


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_what_goes_wrong_in_a_worker_is_told_with_its_place_and_leaves_the_run_alive(stream, error):
    def fall(number, sample):
        if number == 7:
            raise error
        return sample

    made = batches(Altered(stream, fall), dataclasses.replace(CONFIG, num_workers=2), world=ALONE, step=0)
    assert len(list(itertools.islice(made, 3))) == 3
    with pytest.raises(RuntimeError, match=rf"(?s)in fall.*{error.__name__}"):
        next(made)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("crop", [(48, 64), (512, 512)])
def test_a_killed_worker_is_told_wherever_it_was(stream, workers, crop):
    """With float32 images rows go through pipes, so that a worker often dies in the middle of a row."""

    def widen(number, sample):
        return sample._replace(image=sample.image.astype(np.float32))

    data = dataclasses.replace(CONFIG.data, crop_size=crop)
    wide = Altered(TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1), widen)
    for _ in range(3):
        made, processes = begin_endless(wide, workers, data=data)
        victim = random.choice(processes)
        threading.Timer(random.random() / 2, victim.kill).start()
        begun = time.monotonic()
        with pytest.raises(OcrnetError, match=f"loader worker {victim.pid} was killed by SIGKILL; .*num_workers=0"):
            deque(made, maxlen=0)
        assert time.monotonic() - begun < 10
        assert not any(process.is_running() for process in processes)


def test_a_dead_worker_is_told_where_its_batch_is_asked_for_and_nowhere_else(stream):
    before = left()
    made, (first, second) = begin_endless(stream, 2)
    first.kill()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)  # the death of a child must not raise here
    with pytest.raises(OcrnetError, match=f"loader worker {first.pid} was killed by SIGKILL") as told:
        for _ in made:
            pass
    assert not second.is_running()
    assert_nothing_is_left_but(before)
    assert told.tb is not None  # which keeps what the loader had at hand


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_leave_the_signals_of_a_terminal_or_a_scheduler_to_the_run(stream, number):
    run, begun = psutil.Process(), threading.Event()
    before = set(run.children())

    def send() -> None:
        while not begun.is_set():  # from a worker's first moment on
            for child in set(run.children()) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        made, workers = begin_endless(stream, 2)
        for _ in range(20):
            next(made)
    finally:
        begun.set()
        sender.join()
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    made.close()


@pytest.fixture
def own_handlers():
    """Python's usual handlers: who starts the tests in the background may have had these signals ignored."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_run_answers_its_signals_itself_while_batches_go_on(stream, number, own_handlers):
    with StopRequest() as stop:
        made, _ = begin_endless(stream, 2)
        os.kill(os.getpid(), number)
        for _ in range(20):
            next(made)
        assert stop.number == number
        made.close()


def test_a_signal_is_answered_while_a_batch_is_waited_for(stream, own_handlers):
    made, (worker,) = begin_endless(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in made:
            pass
    assert time.monotonic() - begun < 10
    assert not worker.is_running()


def test_handlers_and_settings_are_left_as_they_were(stream):
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    config = mindspore.dataset.config
    names = ["prefetch_size", "enable_watchdog", "multiprocessing_start_method", "num_parallel_workers"]
    try:
        settings = [getattr(config, f"get_{name}")() for name in names]
        method = multiprocessing.get_start_method(allow_none=True)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        made, _ = begin_endless(stream, 2)
        heard.clear()
        subprocess.run(["true"], check=True)
        assert heard
        made.close()
        assert settings == [getattr(config, f"get_{name}")() for name in names]
        assert multiprocessing.get_start_method(allow_none=True) == method
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_closing_ends_a_worker_that_hangs(stream):
    made, (worker,) = begin_endless(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 30
    assert not worker.is_running()


@pytest.mark.parametrize("workers", [1, 3])
def test_closing_leaves_nothing(stream, workers):
    def once() -> None:
        made, _ = begin_endless(stream, workers)
        for _ in range(random.randrange(4)):
            next(made)
        made.close()

    once()
    before = left()
    for _ in range(10):
        once()
    assert_nothing_is_left_but(before)


def test_workers_are_forked_while_mindspore_computes(stream):
    network = nn.SequentialCell(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    optimizer = nn.SGD(network.trainable_params(), 0.1)
    train = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer)
    train.set_train()

    def compute(batch) -> None:
        images = mindspore.Tensor(batch.images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        assert np.isfinite(float(train(images, mindspore.ops.zeros((2, 4, 48, 64)))))

    alone = list(batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=ALONE, step=0))
    compute(alone[0])
    for _ in range(3):
        for batch, wanted in zip(
            batches(stream, dataclasses.replace(CONFIG, num_workers=2), world=ALONE, step=0), alone, strict=True
        ):
            assert digest(batch) == digest(wanted)
            compute(batch)


SCRIPT = """
    import os, pathlib, signal, sys
    import psutil
    from ocrnet.config import Config, Data
    from ocrnet.data.datasets import open_dataset, synthetic
    from ocrnet.engines.mindspore.dataloader import batches
    from ocrnet.data.sampler import TrainStream
    from ocrnet.distributed.launcher import World

    root = pathlib.Path(sys.argv[1])
    synthetic.write(root, train=5, val=0, test=0, size=(64, 128), seed=1)
    cfg = Config(data=Data(crop_size=(48, 64)), num_workers=2, total_step=1000)
    stream = TrainStream(open_dataset("cityscapes", root, "train"), cfg.data, seed=9, channels=32, dropout=0.1)
    made = batches(stream, cfg, world=World(), step=0)
    next(made)
    children = psutil.Process().children(recursive=True)
    print(*(child.pid for child in children), flush=True)
    if sys.argv[2] == "hung":
        children[0].suspend()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "raised":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize(("how", "status"), [("plain", 0), ("hung", 0), ("raised", 1), ("killed", -signal.SIGKILL)])
def test_no_worker_outlives_the_run(tmp_path, how, status):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "data"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert ("Exception ignored" in done.stderr, "Error" in done.stderr) == (False, how == "raised"), done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, workers))
