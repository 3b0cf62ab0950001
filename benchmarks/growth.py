"""Measure how time and memory grow with one quantity at a time; prints one JSON document and a table, draws a plot.

    python benchmarks/growth.py [--out FILE] [--picture FILE]
    python benchmarks/growth.py --toy      (small networks and images, to test the script)

Each point runs in a process of its own and gives the median time of some calls after a warm-up call, and the increase
of its peak memory over the memory in use with the network loaded. The measured exponent is the slope of
log(milliseconds) over log(quantity), fitted to all points of a row. The expected exponent is the same slope for the
network's operations (ocrnet.architecture.flops).
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil
import torch
from common import Noise, write_report

from ocrnet import architecture
from ocrnet.architecture import Arch, flops
from ocrnet.config import Config, Data, Eval
from ocrnet.data.datasets import open_dataset, synthetic
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.tta import make_passes
from ocrnet.evaluation.evaluator import evaluate
from ocrnet.tracking.run_dir import core_versions, git_commit


@dataclass(frozen=True)
class Point:
    """One amount of work: a training step, a prediction, or an evaluation of several images."""

    task: str = "predict"
    width: int = 18
    num_classes: int = 19
    size: tuple[int, int] = (256, 512)
    batch_size: int = 1
    scales: tuple[float, ...] = (1.0,)
    images: int = 1

    @property
    def arch(self) -> Arch:
        """Architecture of the network."""
        return Arch(width=self.width, num_classes=self.num_classes)

    @property
    def pixels(self) -> float:
        """Input pixels of the network, over all scales."""
        return self.size[0] * self.size[1] * sum(scale**2 for scale in self.scales)

    @property
    def operations(self) -> float:
        """Floating-point operations, computed from the network's shapes."""
        if self.task == "train":
            return self.batch_size * flops.train_flops(self.arch, self.size)
        sizes = [tuple(round(scale * side) for side in self.size) for scale in self.scales]
        per_image = sum(flops.forward_flops(self.arch, (height, width)) for height, width in sizes)
        return self.batch_size * self.images * per_image


Quantity = Callable[[Point], float]
SIZES = ((128, 256), (256, 512), (384, 768), (512, 1024))
ROWS: dict[str, tuple[Quantity, list[Point]]] = {
    "predict: pixels": (lambda p: p.pixels, [Point(size=size) for size in (*SIZES, (1024, 2048))]),
    "predict: batch size": (lambda p: p.batch_size, [Point(batch_size=n) for n in (1, 2, 4, 8)]),
    "predict: width": (lambda p: p.width, [Point(width=width) for width in (18, 32, 48)]),
    "predict: classes": (lambda p: p.num_classes, [Point(num_classes=n) for n in (19, 150)]),
    "predict: pixels of all scales": (
        lambda p: p.pixels,
        [Point(scales=scales) for scales in ((1.0,), (0.5, 1.0), (0.5, 1.0, 1.5), (0.5, 0.75, 1.0, 1.25, 1.5, 1.75))],
    ),
    "eval: images": (lambda p: p.images, [Point("evaluate", images=n) for n in (2, 4, 8, 16)]),
    "train: pixels": (lambda p: p.pixels, [Point("train", size=size) for size in SIZES]),
    "train: batch size": (lambda p: p.batch_size, [Point("train", batch_size=n) for n in (1, 2, 4)]),
    "train: width": (lambda p: p.width, [Point("train", width=width) for width in (18, 32, 48)]),
    "train: classes": (lambda p: p.num_classes, [Point("train", num_classes=n) for n in (19, 150)]),
}


def toy(point: Point) -> Point:
    """Return a point with smaller images and a narrower network."""
    return replace(point, size=tuple(side // 4 for side in point.size), width=point.width // 3)


def load(point: Point, folder: str) -> Callable[[], object]:
    """Load the network; return a function that does the work of the point once."""
    training = point.task == "train"
    data = Data(dataset_dir=folder, crop_size=point.size)
    cfg = Config(
        device_target="CPU", mix=True, batch_size=point.batch_size, num_workers=0, total_step=10_000, data=data,
        num_classes=point.num_classes,
    )  # fmt: skip
    stream = Noise(point.size, point.arch.channels) if training else None
    engine = TorchEngine(cfg, point.arch, world=World(), stream=stream)  # type: ignore[arg-type]
    engine.restore(architecture.init(point.arch, 1), 0)
    if training:
        return lambda: engine.train(1)
    eval_cfg = Eval(scales=point.scales)
    if point.task == "evaluate":
        synthetic.write(folder, train=0, val=point.images, test=0, size=point.size)
        dataset = open_dataset("cityscapes", folder, "val")
        return lambda: evaluate(engine, dataset, cfg, eval_cfg=eval_cfg)
    images = np.repeat(Noise(point.size, 1).sample.image[None], point.batch_size, axis=0)
    passes = make_passes(eval_cfg, point.size)
    return lambda: engine.predict(images, passes)


def measure(point: Point, calls: int) -> dict[str, float]:
    """Measure one point; runs in its process."""
    with tempfile.TemporaryDirectory() as folder:
        call = load(point, folder)
        loaded = psutil.Process().memory_info().rss
        call()
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ms": 1000 * statistics.median(seconds), "mib": (peak - loaded) / 2**20}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent b of y = a x^b that fits best."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(rows: dict[str, dict], path: str) -> None:
    """Plot each row on logarithmic axes, relative to its first point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for name, row in rows.items():
        work = [one / row["operations"][0] for one in row["operations"]]
        axes.loglog(work, [one / row["ms"][0] for one in row["ms"]], marker="o", label=name)
    ends = axes.get_xlim()
    axes.loglog(ends, ends, color="gray", linewidth=0.8, linestyle="--", label="proportional")
    axes.set_xlabel("operations, as a multiple of the row's first point")
    axes.set_ylabel("time, as a multiple of the row's first point")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all rows, with one process per point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--picture")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(args.point).items()}
        print(json.dumps(measure(Point(**values), args.calls)))
        return
    rows = {}
    for name, (quantity, points) in ROWS.items():
        if args.toy:
            points = [toy(point) for point in (points[0], points[-1])]
        results = []
        for point in points:
            command = [sys.executable, __file__, "--calls", str(args.calls), "--point", json.dumps(asdict(point))]
            completed = subprocess.run(command, capture_output=True, text=True, check=False)
            if completed.returncode:
                sys.exit(f"{name}, {point}: {completed.stderr}")
            results.append(json.loads(completed.stdout))
        amounts, operations = [quantity(point) for point in points], [point.operations for point in points]
        ms, mib = ([one[key] for one in results] for key in ("ms", "mib"))
        rows[name] = {
            "quantity": amounts, "operations": operations, "ms": ms, "mib": mib,
            "expected_exponent": slope(amounts, operations), "measured_exponent": slope(amounts, ms),
        }  # fmt: skip
        print(f"{name}: {rows[name]['expected_exponent']:.2f} {rows[name]['measured_exponent']:.2f}", file=sys.stderr)
    report = {
        "base": asdict(Point()) | {"mix": True}, "threads": torch.get_num_threads(), "rows": rows,
        "versions": core_versions() | {"torch": torch.__version__}, "commit": git_commit(),
    }  # fmt: skip
    write_report(report, args.out)
    print("| | from | to | ms | MiB | expected exponent | measured |\n| --- | ---: | ---: | --- | --- | ---: | ---: |")
    for name, row in rows.items():
        ms, mib = (" ".join(f"{value:.0f}" for value in row[key]) for key in ("ms", "mib"))
        ends = f"{row['quantity'][0]:,.0f} | {row['quantity'][-1]:,.0f}"
        exponents = f"{row['expected_exponent']:.2f} | {row['measured_exponent']:.2f}"
        print(f"| {name} | {ends} | {ms} | {mib} | {exponents} |")
    assert all(math.isfinite(row["measured_exponent"]) for row in rows.values())
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
