"""Compare exported files with the torch engine and the plain baseline (plain.py) on this CPU, timed in turn.

python benchmarks/export.py [--out FILE] [--checkpoint FILE] [--calibration FOLDER]
python benchmarks/export.py --quick      (a toy network, to test the script)

It prints one JSON document and a table. Without --checkpoint the network has fresh weights: the times are the same,
but the effect of int8 on the labels is then not meaningful.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import write_report
from plain import Plain

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.tta import make_passes
from ocrnet.export import compare
from ocrnet.export.build import Exporter, ExportSpec
from ocrnet.export.formats import Session
from ocrnet.export.runtimes import open_session
from ocrnet.tracking.run_dir import core_versions, git_commit
from ocrnet.weights import Weights

FILES = (
    ("onnx", "float32"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("openvino", "float16"),
    ("openvino", "int8"),
)  # fmt: skip
PAUSE = 0.2  # seconds, so that the threads of the previous runtime stop spinning


def open_engine(found: Weights, mix: bool) -> TorchEngine:
    """Return our engine as `ocrnet predict --mix` opens it."""
    opened = TorchEngine(Config(device_target="CPU", mix=mix), found.arch, world=World())
    opened.restore(found.tensors, 0)
    return opened


def write(found: Weights, spec: ExportSpec, folder: Path, images: list[np.ndarray]) -> tuple[Path, dict]:
    """Export one file and compare it with our engine; return its path, and its size, export time and differences."""
    started = time.perf_counter()
    folder.mkdir()
    exported, logits = Exporter(spec, found, folder, (image[None] for image in images)).draft()
    seconds = time.perf_counter() - started
    sessions = [open_session(spec.format, path) for path in (exported, logits)]
    samples = ((image, None) for image in images[:2])
    differences = compare.compare(open_engine(found, False), found.arch, spec, *sessions, samples)
    files = [exported, *([exported.with_suffix(".bin")] if spec.format == "openvino" else [])]
    size = sum(path.stat().st_size for path in files)
    return exported, {"write_seconds": seconds, "megabytes": size / 1e6, **differences.as_dict()}


def alternate(calls: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    """Time all in turn, after two warm-up calls of each; return the seconds of every call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-2, rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            call()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Export the files, compare them with our engine, and time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--calibration")
    parser.add_argument("--out")
    args = parser.parse_args()
    load, size, rounds = os.getloadavg()[0], (args.size[0], args.size[1]), args.rounds
    arch = Arch(width=args.width)
    if args.quick:
        arch, size, rounds = Arch(width=4, blocks=1, modules=(1, 1, 1), channels=16, key_channels=8), (64, 128), 1
    if args.checkpoint:
        found = weights.read(args.checkpoint)
    else:
        found = Weights(Path("fresh"), dict(architecture.init(arch, 1)), arch, {})
    images = [compare.draw(size, index) for index in range(4)]
    if args.calibration:
        images = [compare.read(path, size) for path in compare.files(args.calibration, "--calibration", 16)]
    image = images[0][None]
    passes = make_passes(Eval(), size)
    baseline, ours, mixed = Plain(found.arch), open_engine(found, False), open_engine(found, True)
    baseline.model.load_state_dict(
        {name: torch.from_numpy(found.tensors[name]) for name in baseline.model.state_dict()}
    )
    calls: dict[str, Callable[[], np.ndarray]] = {
        "plain torch, float32": lambda: baseline.predict(image),
        "torch engine, float32": lambda: ours.predict(image, passes)["labels"],
    }
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if half:
        calls["torch engine, bfloat16"] = lambda: mixed.predict(image, passes)["labels"]
    report: dict = {
        "network": f"W{found.arch.width}",
        "size": size,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "bfloat16": half,
        "versions": core_versions() | dict(ours.versions),
        "commit": git_commit(),
        "load_before": load,
    }
    with tempfile.TemporaryDirectory() as name:
        for kind, precision in FILES:
            title = f"{kind}, {precision}"
            spec = ExportSpec(kind, precision, "uint8", "labels", size, Data.mean, Data.std)
            print(f"writing {title}", flush=True)
            path, report[title] = write(found, spec, Path(name) / title.replace(", ", "_"), images)
            sessions: dict[str, Session] = {title: open_session(kind, path)}
            if half and title == "openvino, float32":
                sessions["openvino, bfloat16"] = open_session(kind, path, mix=True)
            for label, session in sessions.items():
                report.setdefault(label, {})
                report["versions"][kind] = session.runtime
                calls[label] = lambda session=session: session.run(image)  # type: ignore[misc]
        seconds = alternate(calls, rounds)
    plain = statistics.median(seconds["plain torch, float32"])
    expected = calls["torch engine, float32"]()
    for label, times in seconds.items():
        median = statistics.median(times)
        equal = float((calls[label]() == expected).mean())
        row = {"seconds": times, "median": median, "ratio": plain / median, "labels_as_float32": equal}
        report[label] = report.get(label, {}) | row
    write_report(report, args.out)
    for label in seconds:
        row = report[label]
        print(f"{label:<24} {1000 * row['median']:8.1f} ms  {row['ratio']:5.2f} x plain  "
              f"{100 * row['labels_as_float32']:8.3f} % of the labels")  # fmt: skip


if __name__ == "__main__":
    main()
