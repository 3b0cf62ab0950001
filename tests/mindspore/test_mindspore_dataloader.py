"""The GeneratorDataset yields the same bytes for any number of workers and ranks, and from any start step."""

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

SINGLE_RANK = World()
CONFIG = Config(batch_size=2, total_step=6, data=Data(crop_size=(48, 64)))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TrainStream:
    root = tmp_path_factory.mktemp("scenes") / "data"
    synthetic.write(root, train=5, val=0, test=0, size=(64, 128), seed=1)
    return TrainStream(open_dataset("cityscapes", root, "train"), CONFIG.data, seed=9, channels=32, dropout=0.1)


class ChangedStream:
    """A stream that applies ``change(number, sample)`` to each sample."""

    def __init__(self, stream, change) -> None:
        self.stream, self.change, self.channels = stream, change, stream.channels

    def __getitem__(self, number: int) -> Sample:
        return self.change(number, self.stream[number])


def digest(batch) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in batch[:3])).hexdigest()


def digests(stream, *, workers=0, step=0, world=SINGLE_RANK, **changes) -> list[str]:
    cfg = dataclasses.replace(CONFIG, num_workers=workers, **changes)
    return [digest(batch) for batch in batches(stream, cfg, world=world, step=step)]


def start_long_loader(stream, workers, **changes):
    """Consume the first batch of a loader with many batches; return the loader and its worker processes."""
    others = set(psutil.Process().children())
    cfg = dataclasses.replace(CONFIG, num_workers=workers, total_step=100_000, **changes)
    loader = batches(stream, cfg, world=SINGLE_RANK, step=0)
    next(loader)
    return loader, [child for child in psutil.Process().children() if child not in others]


def resources() -> tuple[int, int, int]:
    run = psutil.Process()
    return len(run.children(recursive=True)), run.num_threads(), run.num_fds()


def assert_resources_are_released(before) -> None:
    end = time.monotonic() + 10
    while any(now > then for now, then in zip(resources(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.05)  # threads may still be exiting
    assert all(now <= then for now, then in zip(resources(), before, strict=True)), (resources(), before)


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_any_number_of_workers_gives_the_same_bytes(stream, workers):
    expected = digests(stream)
    assert len(expected) == 6
    assert digests(stream, workers=workers) == expected
    assert len(set(expected)) == 6


def test_workers_that_build_and_use_a_cache_give_the_same_bytes(stream, tmp_path):
    datasets = cache.prepare(str(tmp_path / "cache"), {"images": stream.dataset})
    cached = TrainStream(datasets["images"], CONFIG.data, seed=9, channels=32, dropout=0.1)
    expected = digests(stream)
    assert digests(cached, workers=2) == expected
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert digests(cached, workers=2) == expected


@pytest.mark.parametrize("prefetch", [1, 3, 100])
def test_the_queue_size_does_not_change_the_batches(stream, prefetch):
    expected = digests(stream, total_step=40)
    for workers in (1, 4, 6):
        assert digests(stream, workers=workers, prefetch_size=prefetch, total_step=40) == expected


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_loader_started_at_any_step_yields_the_remaining_batches(stream, workers, step):
    assert digests(stream, workers=workers, step=step) == digests(stream)[step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_all_ranks_are_the_batches_of_a_single_rank(stream, ranks, workers):
    cfg = dataclasses.replace(CONFIG, batch_size=2 * ranks, num_workers=0)
    single_rank = batches(stream, cfg, world=World(), step=0)
    part = dataclasses.replace(CONFIG, num_workers=workers)
    shares = [batches(stream, part, world=World(rank, ranks), step=0) for rank in range(ranks)]
    for whole, *parts in itertools.zip_longest(single_rank, *shares):
        for field in range(3):
            assert np.array_equal(whole[field], np.concatenate([part[field] for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_contain_the_same_samples_as_whole_batches(stream, workers):
    cut_up = digests(stream, workers=workers, batch_size=2, accumulate_steps=3)
    assert cut_up == digests(stream, batch_size=2, total_step=18)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_documented_shapes_and_dtypes(stream, workers):
    cfg = dataclasses.replace(CONFIG, num_workers=workers)
    images, labels, dropout_masks, unreadable = next(batches(stream, cfg, world=World(), step=0))
    assert (images.shape, images.dtype) == ((2, 48, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((2, 48, 64), np.uint8)
    assert (dropout_masks.shape, dropout_masks.dtype) == ((2, 32), np.bool_)
    assert unreadable == ()


def test_later_batches_do_not_overwrite_earlier_ones(stream):
    loader, _ = start_long_loader(stream, 2)
    kept_batches = list(itertools.islice(loader, 30))
    loader.close()
    single_rank = batches(stream, dataclasses.replace(CONFIG, num_workers=0, total_step=31), world=SINGLE_RANK, step=1)
    assert [digest(batch) for batch in kept_batches] == [digest(batch) for batch in single_rank]


@pytest.mark.parametrize("workers", [0, 2])
def test_float32_images_are_kept_even_if_they_exceed_the_row_memory(stream, workers):
    def to_float32_with_inf(number, sample):
        return sample._replace(image=np.where(sample.image > 99, np.inf, sample.image).astype(np.float32))

    data = dataclasses.replace(CONFIG.data, crop_size=(512, 512))  # as float32 an image takes 6 MB, and a row has 4 MB
    large = TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1)
    cfg = dataclasses.replace(CONFIG, num_workers=workers, data=data, total_step=3)
    for batch, plain in zip(
        batches(ChangedStream(large, to_float32_with_inf), cfg, world=SINGLE_RANK, step=0),
        batches(large, dataclasses.replace(cfg, num_workers=0), world=SINGLE_RANK, step=0),
        strict=True,
    ):
        assert batch.images.dtype == np.float32
        assert np.array_equal(batch.images, np.where(plain.images > 99, np.inf, plain.images))
        assert np.array_equal(batch.labels, plain.labels)


@pytest.mark.parametrize("max_rowsize", [2, 16])
def test_a_crop_close_to_max_rowsize_is_complete(stream, max_rowsize):
    data = dataclasses.replace(CONFIG.data, crop_size=(512, 1020))  # slightly less than 2 MB
    large = TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1)
    found = {
        workers: digests(large, workers=workers, max_rowsize=max_rowsize, data=data, batch_size=8, total_step=3)
        for workers in (0, 2)
    }
    assert found[0] == found[2]


def test_a_sample_above_max_rowsize_is_rejected_at_once_with_the_required_value(stream):
    data = dataclasses.replace(CONFIG.data, crop_size=(512, 1024))
    cfg = dataclasses.replace(CONFIG, data=data, max_rowsize=1, num_workers=1)
    with pytest.raises(OcrnetError, match=r"\[512, 1024\] takes 3 MB but max_rowsize is 1; set max_rowsize: 3 "):
        batches(stream, cfg, world=SINGLE_RANK, step=0)
    batches(stream, dataclasses.replace(cfg, max_rowsize=3), world=SINGLE_RANK, step=0)
    batches(stream, dataclasses.replace(cfg, num_workers=0), world=SINGLE_RANK, step=0)


def test_insufficient_shared_memory_becomes_an_error_with_a_remedy(stream):
    with pytest.raises(OcrnetError, match=r"(?s)Insufficient shared memory.*; .*lower num_workers or prefetch_size"):
        start_long_loader(stream, 1, prefetch_size=10**7)
    assert digests(stream, workers=1) == digests(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_names_an_unreadable_file(stream, tmp_path, workers):
    synthetic.write(tmp_path / "data", train=2, val=0, test=0, size=(64, 128), seed=1)
    dataset = open_dataset("cityscapes", tmp_path / "data", "train")
    victim = dataset.pairs[1].image
    victim.write_bytes(victim.read_bytes()[:200])
    unreadable_stream = TrainStream(dataset, CONFIG.data, seed=9, channels=32, dropout=0.1)
    with pytest.raises(OcrnetError, match=victim.name) as raised:
        digests(unreadable_stream, workers=workers)
    with pytest.raises(OcrnetError) as expected:
        dataset.read(1)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_list_the_unreadable_files_that_were_skipped(stream, workers):
    def with_unreadable_files(number, sample):
        return sample._replace(unreadable=(f'file {number}: \N{SNOWMAN} "quoted"',) * (number % 3))

    cfg = dataclasses.replace(CONFIG, num_workers=workers, batch_size=3, total_step=2)
    loaded = list(batches(ChangedStream(stream, with_unreadable_files), cfg, world=SINGLE_RANK, step=0))
    one, two, four, five = (f'file {number}: \N{SNOWMAN} "quoted"' for number in (1, 2, 4, 5))
    assert [batch.unreadable for batch in loaded] == [(one, two, two), (four, five, five)]


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_an_exception_in_a_worker_is_raised_with_its_traceback_in_the_run(stream, error):
    def fail(number, sample):
        if number == 7:
            raise error
        return sample

    loader = batches(ChangedStream(stream, fail), dataclasses.replace(CONFIG, num_workers=2), world=SINGLE_RANK, step=0)
    assert len(list(itertools.islice(loader, 3))) == 3
    with pytest.raises(RuntimeError, match=rf"(?s)in fail.*{error.__name__}"):
        next(loader)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("crop", [(48, 64), (512, 512)])
def test_a_worker_killed_at_any_moment_raises_an_error(stream, workers, crop):
    """Rows of float32 images are sent through pipes, so that a worker is often killed in the middle of a row."""

    def to_float32(number, sample):
        return sample._replace(image=sample.image.astype(np.float32))

    data = dataclasses.replace(CONFIG.data, crop_size=crop)
    wide = ChangedStream(TrainStream(stream.dataset, data, seed=9, channels=32, dropout=0.1), to_float32)
    for _ in range(3):
        loader, processes = start_long_loader(wide, workers, data=data)
        victim = random.choice(processes)
        threading.Timer(random.random() / 2, victim.kill).start()
        started = time.monotonic()
        with pytest.raises(OcrnetError, match=f"loader worker {victim.pid} was killed by SIGKILL; .*num_workers=0"):
            deque(loader, maxlen=0)
        assert time.monotonic() - started < 10
        assert not any(process.is_running() for process in processes)


def test_a_killed_worker_raises_only_when_its_batch_is_requested(stream):
    before = resources()
    loader, (first, second) = start_long_loader(stream, 2)
    first.kill()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)  # the death of a child must not raise here
    with pytest.raises(OcrnetError, match=f"loader worker {first.pid} was killed by SIGKILL") as raised:
        for _ in loader:
            pass
    assert not second.is_running()
    assert_resources_are_released(before)
    assert raised.tb is not None  # the traceback keeps references to the loader's objects


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_ignore_stop_signals(stream, number):
    run, started = psutil.Process(), threading.Event()
    before = set(run.children())

    def send() -> None:
        while not started.is_set():  # from the start of each worker
            for child in set(run.children()) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        loader, workers = start_long_loader(stream, 2)
        for _ in range(20):
            next(loader)
    finally:
        started.set()
        sender.join()
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    loader.close()


@pytest.fixture
def default_handlers():
    """Install Python's default handlers: these signals may be ignored if the tests run in the background."""
    defaults = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_run_handles_its_signals_while_batches_continue(stream, number, default_handlers):
    with StopRequest() as stop:
        loader, _ = start_long_loader(stream, 2)
        os.kill(os.getpid(), number)
        for _ in range(20):
            next(loader)
        assert stop.number == number
        loader.close()


def test_a_signal_interrupts_the_wait_for_a_batch(stream, default_handlers):
    loader, (worker,) = start_long_loader(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in loader:
            pass
    assert time.monotonic() - started < 10
    assert not worker.is_running()


def test_signal_handlers_and_mindspore_settings_are_restored(stream):
    received = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: received.append(number))
    config = mindspore.dataset.config
    names = ["prefetch_size", "enable_watchdog", "multiprocessing_start_method", "num_parallel_workers"]
    try:
        settings = [getattr(config, f"get_{name}")() for name in names]
        method = multiprocessing.get_start_method(allow_none=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        loader, _ = start_long_loader(stream, 2)
        received.clear()
        subprocess.run(["true"], check=True)
        assert received
        loader.close()
        assert settings == [getattr(config, f"get_{name}")() for name in names]
        assert multiprocessing.get_start_method(allow_none=True) == method
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_close_kills_a_hung_worker(stream):
    loader, (worker,) = start_long_loader(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 30
    assert not worker.is_running()


@pytest.mark.parametrize("workers", [1, 3])
def test_close_releases_processes_threads_and_files(stream, workers):
    def open_and_close() -> None:
        loader, _ = start_long_loader(stream, workers)
        for _ in range(random.randrange(4)):
            next(loader)
        loader.close()

    open_and_close()
    before = resources()
    for _ in range(10):
        open_and_close()
    assert_resources_are_released(before)


def test_workers_can_be_forked_while_mindspore_computes(stream):
    network = nn.SequentialCell(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    optimizer = nn.SGD(network.trainable_params(), 0.1)
    train = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), optimizer)
    train.set_train()

    def compute(batch) -> None:
        images = mindspore.Tensor(batch.images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        assert np.isfinite(float(train(images, mindspore.ops.zeros((2, 4, 48, 64)))))

    expected_batches = list(batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=SINGLE_RANK, step=0))
    compute(expected_batches[0])
    for _ in range(3):
        for batch, expected in zip(
            batches(stream, dataclasses.replace(CONFIG, num_workers=2), world=SINGLE_RANK, step=0),
            expected_batches,
            strict=True,
        ):
            assert digest(batch) == digest(expected)
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
    loader = batches(stream, cfg, world=World(), step=0)
    next(loader)
    children = psutil.Process().children(recursive=True)
    print(*(child.pid for child in children), flush=True)
    if sys.argv[2] == "hung":
        children[0].suspend()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "raised":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize(("mode", "status"), [("plain", 0), ("hung", 0), ("raised", 1), ("killed", -signal.SIGKILL)])
def test_no_worker_outlives_the_run(tmp_path, mode, status):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "data"), mode]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == status, completed.stderr
    assert ("Exception ignored" in completed.stderr, "Error" in completed.stderr) == (False, mode == "raised"), (
        completed.stderr
    )
    workers = [int(pid) for pid in completed.stdout.split()]
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, workers))
