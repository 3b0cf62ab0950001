"""Compare several ranks of one machine with a single one: images per second and communication time.

    python benchmarks/scaling.py --ranks 1 8 [--device_target GPU] [--width 48] [--size 512 1024] [--out FILE]
    torchrun ... benchmarks/scaling.py --worker --out FILE       (what it launches; for several machines)

The measurements check docs/scaling.md. torchrun launches each number of ranks in turn, A B A B, with the same batch
size per rank, so that N ranks do N times the work. Also measured: the step with local batch norm, and the collectives
without computation: the all-reduce of the gradient buckets, and one small all-reduce per batch norm and direction.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Noise, write_report

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config
from ocrnet.distributed.launcher import read_world
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.torch.hrnet import Norm
from ocrnet.tracking.run_dir import core_versions, git_commit


def work(args: argparse.Namespace) -> None:
    """Measure on one of the ranks that torchrun started; rank 0 writes the results."""
    world, size = read_world(), tuple(args.size)
    cfg = Config(
        device_target=args.device_target,
        mix=args.device_target == "GPU",
        batch_size=args.batch_size,
        num_workers=0,
        total_step=10_000,
    )
    arch = Arch(width=args.width)
    engine = TorchEngine(cfg, arch, world=world, stream=Noise(size, arch.channels))  # type: ignore[arg-type]
    engine.restore(architecture.init(arch, 1), 0)
    engine.train(args.steps)
    found = {"seconds_per_step": step_seconds(engine, args.steps), "memory_gib": engine.train(1).memory_bytes / 2**30}
    if world.size > 1:
        for module in (norms := [m for m in engine.model.modules() if isinstance(m, Norm)]):
            module.sync = False
        engine.train(1)
        found["seconds_per_step_local_norm"] = step_seconds(engine, args.steps)
        assert engine.gradient_sum is not None
        found["gradient_sum_seconds"] = seconds(engine, lambda: sum_buckets(engine.gradient_sum.buckets))
        found["norm_sums_seconds"] = seconds(engine, lambda: sum_norms(engine, [len(m.weight) for m in norms]))
        found["norms"] = len(norms)
        found["gradient_bytes"] = sum(bucket.numel() * bucket.element_size() for bucket in engine.gradient_sum.buckets)
    gpu = args.device_target == "GPU"
    found |= {"device": torch.cuda.get_device_name() if gpu else platform.processor(), "ranks": world.size}
    if world.rank == 0:
        Path(args.out).write_text(json.dumps(found), encoding="utf-8")
    engine.close()


def step_seconds(engine: TorchEngine, steps: int) -> float:
    """Return the median seconds per step of three segments, without the time of waiting for data."""
    segments = [engine.train(steps) for _ in range(3)]
    return statistics.median((one.seconds - one.data_seconds) / steps for one in segments)


def sum_buckets(buckets: list[torch.Tensor]) -> None:
    """All-reduce the gradient buckets as a training step does."""
    for handle in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
        handle.wait()


def sum_norms(engine: TorchEngine, channels: list[int]) -> None:
    """Run the all-reduces of all batch norms, forward and backward."""
    for count in channels * 2:
        dist.all_reduce(torch.zeros(2 * count, device=engine.device))


def seconds(engine: TorchEngine, collective: Callable[[], None]) -> float:
    """Return the median seconds of five calls of a collective, after a warm-up call."""
    taken = []
    for _ in range(6):
        dist.barrier()
        started = time.perf_counter()
        collective()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def launch(args: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Launch a number of ranks; return the measurements of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        flags = ["--device_target", args.device_target, "--width", args.width, "--size", *args.size,
                "--batch_size", args.batch_size, "--steps", args.steps]  # fmt: skip
        command = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", __file__, "--worker", *flags, "--out", out]
        program = [str(Path(sys.executable).with_name("torchrun")), *command[1:]]
        subprocess.run([str(word) for word in program], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    """Measure each number of ranks in turn, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument(
        "--device_target", default="GPU" if torch.cuda.is_available() else "CPU", choices=("GPU", "CPU")
    )
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch_size", type=int, default=2, help="crops per rank")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    rounds = [{ranks: launch(args, ranks) for ranks in args.ranks} for _ in range(args.rounds)]
    found = {}
    for ranks in args.ranks:
        ones = [one[ranks] for one in rounds]
        medians = {
            key: statistics.median(one[key] for one in ones) if isinstance(value, float) else value
            for key, value in ones[0].items()
        }
        found[ranks] = medians | {"images_per_second": ranks * args.batch_size / medians["seconds_per_step"]}
    base = found[args.ranks[0]]["images_per_second"] / args.ranks[0]
    report = {
        "versions": core_versions() | {"torch": torch.__version__},
        "commit": git_commit(),
        "settings": {"width": args.width, "size": args.size, "batch_size": args.batch_size, "rounds": args.rounds},
        "ranks": found,
        "share_of_ideal": {n: one["images_per_second"] / (n * base) for n, one in found.items()},
    }
    write_report(report, args.out)


if __name__ == "__main__":
    main()
