"""Compare our engine with the plain baseline (plain.py) on this CPU; prints one JSON document and a summary.

The two are timed in turn (A B A B) in one run.

python benchmarks/cpu.py [--out FILE]
python benchmarks/cpu.py --width 8 --train_size 64 128 --predict_size 64 128 --rounds 1      (to test the script)
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from common import Noise, write_report
from plain import Plain

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions, git_commit

Size = tuple[int, int]


def open_ours(arch: Arch, size: Size) -> TorchEngine:
    """Return our engine as `--mix True --batch_size 1` opens it."""
    cfg = Config(device_target="CPU", mix=True, batch_size=1, num_workers=0, total_step=10_000)
    engine = TorchEngine(cfg, arch, world=World(), stream=Noise(size, arch.channels))  # type: ignore[arg-type]
    engine.restore(architecture.init(arch, 1), 0)
    return engine


def alternate(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> dict[str, object]:
    """Time both in turn, after one warm-up call of each; return seconds, medians and the ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):  # the first is the warm-up
        for times, call in zip(seconds, (plain, ours), strict=True):
            started = time.perf_counter()
            call()
            if round_:
                times.append(time.perf_counter() - started)
    medians = [statistics.median(times) for times in seconds]
    return {
        "plain_seconds": seconds[0],
        "ours_seconds": seconds[1],
        "plain_median": medians[0],
        "ours_median": medians[1],
        "ratio": medians[0] / medians[1],
    }


def main() -> None:
    """Measure a training step of one crop and the prediction of one image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--train_size", type=int, nargs=2, default=(256, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--predict_size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    arch, train_size, predict_size = Arch(width=args.width), tuple(args.train_size), tuple(args.predict_size)
    baseline, engine = Plain(arch), open_ours(arch, train_size)
    sample = Noise(train_size, 1).sample
    image = Noise(predict_size, 1).sample.image[None]
    passes = make_passes(Eval(), predict_size)
    report = {
        "network": f"W{args.width}",
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "versions": core_versions() | dict(engine.versions),
        "commit": git_commit(),
        "load_before": load,
        f"train step {train_size[0]}x{train_size[1]}": alternate(
            lambda: baseline.train(sample.image[None], sample.label[None]), lambda: engine.train(1), args.rounds
        ),
        f"predict {predict_size[0]}x{predict_size[1]}": alternate(
            lambda: baseline.predict(image), lambda: engine.predict(image, passes), args.rounds
        ),
    }
    write_report(report, args.out)
    for name, row in report.items():
        if isinstance(row, dict) and "ratio" in row:
            print(f"{name}: plain {row['plain_median']:.3f} s, ours {row['ours_median']:.3f} s, {row['ratio']:.2f} x")


if __name__ == "__main__":
    main()
