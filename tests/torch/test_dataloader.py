"""The DataLoader yields the same bytes for any number of workers and ranks, and from any start step."""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import os
import signal
import threading
import time

import psutil
import pytest
import torch
from torch.utils.data._utils import signal_handling

from ocrnet.config import Config, Data
from ocrnet.data.datasets import cache, open_dataset, synthetic
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch.dataloader import batches
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import SIGNALS

SINGLE_RANK = World()
CONFIG = Config(batch_size=2, total_step=6, data=Data(crop_size=(48, 64)))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TrainStream:
    root = tmp_path_factory.mktemp("scenes") / "data"
    synthetic.write(root, train=5, val=0, test=0, size=(64, 128), seed=1)
    return TrainStream(open_dataset("cityscapes", root, "train"), CONFIG.data, seed=9, channels=32, dropout=0.1)


def digests(stream, *, workers=0, step=0, world=SINGLE_RANK, **changes) -> list[str]:
    cfg = dataclasses.replace(CONFIG, num_workers=workers, **changes)
    return [
        hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch[:3])).hexdigest()
        for batch in batches(stream, cfg, world=world, step=step)
    ]


@pytest.mark.parametrize("workers", [1, 4])
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


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_loader_started_at_any_step_yields_the_remaining_batches(stream, workers, step):
    assert digests(stream, workers=workers, step=step) == digests(stream)[step:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_all_ranks_are_the_batches_of_a_single_rank(stream, ranks):
    cfg = dataclasses.replace(CONFIG, batch_size=2 * ranks, num_workers=0)
    single_rank = batches(stream, cfg, world=World(), step=0)
    shares = [
        batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=World(r, ranks), step=0) for r in range(ranks)
    ]
    for whole, *parts in itertools.zip_longest(single_rank, *shares):
        for field in range(3):
            assert torch.equal(whole[field], torch.cat([part[field] for part in parts]))


def test_micro_batches_contain_the_same_samples_as_whole_batches(stream):
    assert digests(stream, batch_size=2, accumulate_steps=3) == digests(stream, batch_size=2, total_step=18)


def test_batches_have_the_documented_shapes_and_dtypes(stream):
    images, labels, dropout_masks, unreadable = next(
        batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=World(), step=0)
    )
    assert (images.shape, images.dtype) == ((2, 48, 64, 3), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, 48, 64), torch.uint8)
    assert (dropout_masks.shape, dropout_masks.dtype) == ((2, 32), torch.bool)
    assert unreadable == ()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_names_an_unreadable_file(stream, tmp_path, workers):
    synthetic.write(tmp_path / "data", train=2, val=0, test=0, size=(64, 128), seed=1)
    dataset = open_dataset("cityscapes", tmp_path / "data", "train")
    victim = dataset.pairs[1].image
    victim.write_bytes(victim.read_bytes()[:200])
    unreadable_stream = TrainStream(dataset, CONFIG.data, seed=9, channels=32, dropout=0.1)
    with pytest.raises(OcrnetError, match=victim.name):
        digests(unreadable_stream, workers=workers)


def start_long_loader(stream, workers):
    """Consume the first batch of a loader with many batches; return the loader and its worker processes."""
    others = set(psutil.Process().children())
    cfg = dataclasses.replace(CONFIG, num_workers=workers, total_step=100_000)
    loader = batches(stream, cfg, world=SINGLE_RANK, step=0)
    next(loader)
    return loader, [child for child in psutil.Process().children() if child not in others]


def test_a_killed_worker_raises_only_when_its_batch_is_requested(stream):
    loader, (first, second) = start_long_loader(stream, 2)
    first.kill()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)  # the death of a child must not raise here
    with pytest.raises(OcrnetError, match=f"loader worker {first.pid} was killed by SIGKILL"):
        for _ in loader:
            pass
    assert not second.is_running()


def test_a_loader_starts_at_the_address_of_one_whose_worker_died(stream):
    """PyTorch registers the workers of a loader under the address of its iterator, which Python reuses."""
    loader, (worker,) = start_long_loader(stream, 1)
    (iterator,) = (item for item in gc.get_objects() if type(item).__name__ == "_MultiProcessingDataLoaderIter")
    address = id(iterator)
    del iterator
    worker.kill()
    with pytest.raises(OcrnetError, match="was killed by SIGKILL"):
        for _ in loader:
            pass
    signal_handling._set_worker_pids(address, (os.getpid(),))  # raises if the address is still registered
    signal_handling._remove_worker_pids(address)


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


def test_close_kills_a_hung_worker(stream):
    loader, (worker,) = start_long_loader(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(30)
    hangs = closing.is_alive() or worker.is_running()
    if hangs:
        worker.kill()  # otherwise this process would wait for it at exit
    assert not hangs
