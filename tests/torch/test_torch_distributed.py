"""Two and three processes give the loss, gradients and BN statistics of a single one, in float64 from fresh weights."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ocrnet.distributed.launcher import World
from ocrnet.engines.torch import distributed
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[2]
CASES = [("unchanged", 1), ("unchanged", 3), ("mean of means", 1), ("local norm", 1)]
SCRIPT = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from ocrnet import architecture
from ocrnet.engines.torch import distributed
from ocrnet.utils.errors import OcrnetError
from ocrnet.engines.torch.hrnet import Norm
from ocrnet.engines.torch.loss import SegmentationLoss, label_weight
from ocrnet.engines.torch.ocr import OCRNet
from ocrnet.architecture import Arch
from ocrnet.distributed.launcher import World, read_world

folder, cases = sys.argv[1], eval(sys.argv[2])
world = read_world()
distributed_run = world.size > 1
if distributed_run:
    distributed.join(world, torch.device("cpu"), 60)
arch = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=7, channels=16, key_channels=8)
rng = np.random.default_rng(0)
x = torch.from_numpy(rng.standard_normal((6, 3, 64, 64)))
label = rng.integers(0, 7, (6, 64, 64)).astype(np.uint8)
for image, share in enumerate((0.05, 0.7, 0.3, 0.9, 0.0, 0.5)):
    label[image][rng.random((64, 64)) < share] = 255
label = torch.from_numpy(label)
weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
loss = SegmentationLoss(weight, True)

def step(mode, micro_batches):
    model = OCRNet(arch)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in architecture.init(arch, 3).items()})
    model.double().train()
    for module in model.modules():
        if isinstance(module, Norm):
            module.sync = distributed_run and mode != "local norm"
    shares = torch.arange(6).reshape(micro_batches, world.size, -1)[:, world.rank]
    denominator = sum(label_weight(label[share], weight) for share in shares)
    gradients = distributed.GradientSum(model.parameters()) if distributed_run else None
    heads = torch.zeros(2, dtype=torch.float64)
    if distributed_run and mode != "mean of means":
        dist.all_reduce(denominator)
    if distributed_run:
        gradients.begin()
    for number, share in enumerate(shares, 1):
        keep = torch.ones(len(share), arch.channels, dtype=torch.bool)
        total, parts = loss(model(x[share], keep), label[share], denominator)
        if distributed_run:
            gradients.expect(last=number == len(shares))
        total.backward()
        heads += parts
    if distributed_run:
        gradients.finish()
        dist.all_reduce(heads)
        if mode == "mean of means":
            heads /= world.size
            for bucket in gradients.buckets:
                bucket /= world.size
    results = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return {"heads": heads} | results

for mode, micro_batches in cases:
    if 6 % (world.size * micro_batches) == 0:
        results = step(mode, micro_batches)
        if world.rank == world.size - 1:
            path = f"{folder}/{world.size} {mode} {micro_batches}.npz"
            np.savez(path, **{name: tensor.numpy() for name, tensor in results.items()})
if distributed_run:
    distributed.leave()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder with the losses, gradients and statistics that the last rank of 1, 2 and 3 ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(folder), repr(CASES)]
    for size in (1, 2, 3):
        processes = [
            subprocess.Popen(command, env=env | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size)})
            for rank in range(size)
        ]  # not torchrun's variables, so that the ranks meet through the rendezvous file
        assert [process.wait(timeout=100) for process in processes] == [0] * size
    return folder


def largest_differences(folder: Path, size: int, mode: str = "unchanged", micro_batches: int = 1) -> dict[str, float]:
    """Return the largest relative difference of losses, gradients and statistics from those of a single rank."""
    actual = np.load(folder / f"{size} {mode} {micro_batches}.npz")
    expected = np.load(folder / f"1 unchanged {micro_batches}.npz")
    differences = {"heads": 0.0, "gradients": 0.0, "statistics": 0.0}
    for name, expected_value in expected.items():
        kind = "heads" if name == "heads" else "statistics" if "running" in name else "gradients"
        difference = np.linalg.norm(actual[name] - expected_value) / max(np.linalg.norm(expected_value), 1e-6)
        differences[kind] = max(differences[kind], difference)
    return differences


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 1), (3, 1), (2, 3)])
def test_several_ranks_compute_the_same_as_one_rank_with_the_whole_batch(size, micro_batches, folder):
    differences = largest_differences(folder, size, micro_batches=micro_batches)
    assert differences["heads"] < 1e-12
    assert differences["gradients"] < 1e-9
    assert differences["statistics"] < 1e-12


@pytest.mark.parametrize("mode", ["mean of means", "local norm"])
def test_a_wrong_reduction_exceeds_the_bounds(mode, folder):
    """These are the negative controls of the bounds."""
    differences = largest_differences(folder, 2, mode)
    assert differences["gradients"] > 1e-2
    assert differences["heads"] > 1e-6


@pytest.mark.parametrize(
    ("machines", "first"),
    [("node07", "node07"), ("node[07-09,12],login1", "node07"), ("a1,b[2-3]", "a1"), ("gpu-[003,7]", "gpu-003")],
)
def test_the_first_machine_of_a_slurm_node_list(machines, first):
    assert distributed.first_host(machines) == first


def test_a_restart_on_an_old_store_uses_a_new_name():
    """torchrun's store still holds the requests and responses of killed ranks."""
    store = dist.HashStore()
    names = set()
    for _ in range(3):
        store.set("token/2", "killed")  # this rank sent its request and was killed before the response
        with ThreadPoolExecutor(3) as pool:
            start = [pool.submit(distributed._launch_id, store, World(rank, 3), 20.0) for rank in (1, 2, 0)]
        (name,) = {future.result() for future in start}
        names.add(name)
    assert len(names) == 3


def test_the_error_names_the_missing_ranks():
    with pytest.raises(RuntimeError, match=r"missing ranks: 1, 2"):
        distributed._launch_id(dist.HashStore(), World(0, 3), 0.1)


def test_a_configuration_error_of_the_rendezvous_is_not_reported_as_a_timeout(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(OcrnetError, match="MASTER_ADDR") as raised:
        distributed.join(World(1, 2), torch.device("cpu"), 5.0)
    assert "rank_timeout" not in str(raised.value)
