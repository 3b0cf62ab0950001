"""The DataLoader around the stream: the same bytes for any number of workers and ranks, from any step on."""

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

ALONE = World()
CONFIG = Config(batch_size=2, total_step=6, data=Data(crop_size=(48, 64)))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TrainStream:
    root = tmp_path_factory.mktemp("scenes") / "data"
    synthetic.write(root, train=5, val=0, test=0, size=(64, 128), seed=1)
    return TrainStream(open_dataset("cityscapes", root, "train"), CONFIG.data, seed=9, channels=32, dropout=0.1)


def digests(stream, *, workers=0, step=0, world=ALONE, **changes) -> list[str]:
    cfg = dataclasses.replace(CONFIG, num_workers=workers, **changes)
    return [
        hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch[:3])).hexdigest()
        for batch in batches(stream, cfg, world=world, step=step)
    ]


@pytest.mark.parametrize("workers", [1, 4])
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


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_started_anywhere_the_stream_goes_on(stream, workers, step):
    assert digests(stream, workers=workers, step=step) == digests(stream)[step:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_give_one_ranks_bytes(stream, ranks):
    cfg = dataclasses.replace(CONFIG, batch_size=2 * ranks, num_workers=0)
    alone = batches(stream, cfg, world=World(), step=0)
    shares = [
        batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=World(r, ranks), step=0) for r in range(ranks)
    ]
    for whole, *parts in itertools.zip_longest(alone, *shares):
        for field in range(3):
            assert torch.equal(whole[field], torch.cat([part[field] for part in parts]))


def test_micro_batches_are_the_whole_batch_cut_up(stream):
    assert digests(stream, batch_size=2, accumulate_steps=3) == digests(stream, batch_size=2, total_step=18)


def test_batches_have_the_doors_shapes_and_types(stream):
    images, labels, keeps, unreadable = next(
        batches(stream, dataclasses.replace(CONFIG, num_workers=0), world=World(), step=0)
    )
    assert (images.shape, images.dtype) == ((2, 48, 64, 3), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, 48, 64), torch.uint8)
    assert (keeps.shape, keeps.dtype) == ((2, 32), torch.bool)
    assert unreadable == ()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named(stream, tmp_path, workers):
    synthetic.write(tmp_path / "data", train=2, val=0, test=0, size=(64, 128), seed=1)
    dataset = open_dataset("cityscapes", tmp_path / "data", "train")
    victim = dataset.pairs[1].image
    victim.write_bytes(victim.read_bytes()[:200])
    broken = TrainStream(dataset, CONFIG.data, seed=9, channels=32, dropout=0.1)
    with pytest.raises(OcrnetError, match=victim.name):
        digests(broken, workers=workers)


def begin_endless(stream, workers):
    """Return batches that do not end for long, after the first, and the workers that make them."""
    others = set(psutil.Process().children())
    cfg = dataclasses.replace(CONFIG, num_workers=workers, total_step=100_000)
    made = batches(stream, cfg, world=ALONE, step=0)
    next(made)
    return made, [child for child in psutil.Process().children() if child not in others]


def test_a_dead_worker_is_told_where_its_batch_is_asked_for_and_nowhere_else(stream):
    made, (first, second) = begin_endless(stream, 2)
    first.kill()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)  # the death of a child must not raise here
    with pytest.raises(OcrnetError, match=f"loader worker {first.pid} was killed by SIGKILL"):
        for _ in made:
            pass
    assert not second.is_running()


def test_a_loader_starts_at_the_address_of_one_whose_worker_died(stream):
    """PyTorch registers the workers of a loader under the address of its iterator, which Python reuses."""
    loader, (worker,) = begin_endless(stream, 1)
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


def test_closing_ends_a_worker_that_hangs(stream):
    made, (worker,) = begin_endless(stream, 1)
    os.kill(worker.pid, signal.SIGSTOP)
    closing = threading.Thread(target=made.close, daemon=True)
    closing.start()
    closing.join(30)
    hangs = closing.is_alive() or worker.is_running()
    if hangs:
        worker.kill()  # or this process would wait for it at its end
    assert not hangs
