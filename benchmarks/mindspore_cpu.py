"""Compare our MindSpore engine with the public MindSpore OCRNet (mindspore_public.py) on this CPU.

python benchmarks/mindspore_cpu.py [--width 32] [--size 128 256] [--rounds 3] [--out FILE]
python benchmarks/mindspore_cpu.py --quick      (a toy network, two cases, to test the script)

It measures compile time, training step, prediction and peak memory. Each case runs in a process of its own. The cases
of a group first compile one after another while the others are idle, and then run in turn, A B C A B C. All start from
the same weights and train on the same crop, so their first losses must agree; if they do not, the script exits with an
error.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import Noise, write_report

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data, Eval, Optimizer
from ocrnet.distributed.launcher import World
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions, git_commit

ISA = "ONEDNN_MAX_CPU_ISA"
QUIET = {"GLOG_v": "3"}
PUBLIC, PUBLIC_AVX2, OURS = "public", f"public, {ISA}=AVX2", "ours"
OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, ms_mode: pynative": {"ms_mode": "pynative"},
    "ours, --mix True": {"mix": True},
}
GROUPS = [[PUBLIC, PUBLIC_AVX2, OURS], ["ours, ms_mode: pynative", "ours, --mix True"]]
CLASS_WEIGHTS = tuple(0.8 + 0.02 * number for number in range(19))
TINY = {"width": 4, "blocks": 1, "modules": (1, 1, 1), "channels": 32, "key_channels": 16}
Calls = dict[str, Callable[[], Any]]


def config(size: tuple[int, int], **options: Any) -> Config:
    """Return the public OCRNet's recipe for both, without warmup, so that the first step already changes weights."""
    data = Data(crop_size=size, class_weights=CLASS_WEIGHTS)
    optimizer = Optimizer(decay="no_norm")
    return Config(
        engine="mindspore",
        device_target="CPU",
        num_classes=19,
        batch_size=1,
        num_workers=0,
        warmup_step=0,
        data=data,
        optimizer=optimizer,
        **options,
    )


def noise(arch: Arch, size: tuple[int, int]) -> Noise:
    """Return a stream of one crop, of which an eighth is unlabeled."""
    stream = Noise(size, architecture.head_channels(arch))
    stream.sample.label[: size[0] // 8] = 255
    return stream


def first_state(arch: Arch) -> dict[str, np.ndarray]:
    """Return fresh weights; the two biases that the public OCRNet lacks are 0."""
    state: dict[str, np.ndarray] = dict(architecture.init(arch, 1))
    for name in ("conv3x3_ocr.0.bias", "aux_head.0.bias"):
        state[name] = np.zeros_like(state[name])
    return state


def open_public(arch: Arch, size: tuple[int, int]) -> tuple[Calls, int]:
    """Return the functions that train and predict with the public OCRNet, and its number of trained values."""
    from mindspore_public import PublicOCRNet, inputs

    sample = noise(arch, size).sample
    public = PublicOCRNet(arch, config(size))
    public.restore(first_state(arch))
    x, label = inputs(sample.image[None], sample.label[None])
    return {"train": lambda: public.train(x, label), "predict": lambda: public.predict(x)}, public.parameters()


def open_ours(arch: Arch, size: tuple[int, int], options: Mapping[str, Any]) -> tuple[Calls, int]:
    """Return the functions that train and predict with our engine, and its number of trained values."""
    from ocrnet.engines.factory import open_engine

    stream, cfg = noise(arch, size), config(size, **options)
    engine = open_engine(cfg, arch, world=World(), stream=stream)  # type: ignore[arg-type]
    engine.restore(first_state(arch), 0)
    weights, image, passes = (cfg.loss.aux, cfg.loss.ocr), stream.sample.image[None], make_passes(Eval(), size)
    return {
        "train": lambda: float(engine.train(1).loss[0] @ weights),
        "predict": lambda: engine.predict(image, passes)["labels"],
    }, architecture.num_parameters(arch)


def serve(case: str, arch: Arch, size: tuple[int, int]) -> None:
    """Run the process of one case: each line of stdin names a call; write its seconds, result and memory as JSON."""
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    calls, parameters = open_public(arch, size) if case not in OPTIONS else open_ours(arch, size, OPTIONS[case])
    for line in sys.stdin:
        started, started_cpu = time.perf_counter(), time.process_time()
        result = calls[line.strip()]()
        response = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - started_cpu,
            "result": result if isinstance(result, float) else np.bincount(result.reshape(-1), minlength=19).tolist(),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "parameters": parameters,
        }
        responses.write(json.dumps(response) + "\n")
    os._exit(0)  # a normal exit makes MindSpore print many messages


class Case:
    """The process of one case, and its responses so far."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.responses: dict[str, list[dict[str, Any]]] = {"train": [], "predict": []}
        environment = {key: value for key, value in os.environ.items() if key != ISA} | QUIET
        if name == PUBLIC_AVX2:
            environment[ISA] = "AVX2"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, name: str) -> None:
        """Train or predict once in the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with status {self.process.wait()}")
        self.responses[name].append(json.loads(line))

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def report(self) -> dict[str, Any]:
        """Return the measurements; the first call includes compilation, and the second still warms up."""
        found: dict[str, Any] = {"parameters": self.responses["train"][0]["parameters"]}
        for name, responses in self.responses.items():
            found[name] = {"peak_gib": responses[-1]["peak_gib"]}
            for key in ("seconds", "cpu_seconds"):
                first, _, *steady = [one[key] for one in responses]
                median = statistics.median(steady)
                found[name] |= {f"compile_{key}": first - median, f"median_{key}": median, key: steady}
        found["losses"] = [one["result"] for one in self.responses["train"]]
        found["predicted"] = self.responses["predict"][-1]["result"]
        return found


def measure(names: list[str], arguments: list[str], rounds: int) -> dict[str, Any]:
    """Measure the cases of a group."""
    cases: list[Case] = []
    try:
        for name in names:
            cases.append(Case(name, arguments))
            cases[-1].call("train")
            cases[-1].call("train")
        for call in ("train", "predict"):
            for case in cases if call == "predict" else ():
                case.call(call)
                case.call(call)
            for _ in range(rounds):
                for case in cases:
                    case.call(call)
        return {case.name: case.report() for case in cases}
    finally:
        for case in cases:
            case.end()


def compare(found: Mapping[str, Any]) -> None:
    """Replace each case's pixel counts of predicted classes by their overlap with ours."""
    ours = np.array(found[OURS]["predicted"])
    for row in found.values():
        row["predicted_as_ours"] = float(np.minimum(row.pop("predicted"), ours).sum() / ours.sum())


def check(found: Mapping[str, Any]) -> None:
    """Check that all cases train the same network: the first losses agree, and the second, after the first update."""
    ours = found[OURS]["losses"]
    for name, row in found.items():
        losses = row["losses"]
        differences = [abs(one / two - 1) for one, two in zip(losses[:2], ours[:2], strict=True)]
        allowed = (5e-3, 5e-2) if "mix" in name else (1e-4, 1e-3)
        if not np.isfinite(losses).all() or any(a > most for a, most in zip(differences, allowed, strict=True)):
            raise SystemExit(f"{name}: the losses {losses} differ from ours, {ours}: network or training step differ")


def cpu() -> str:
    """Return the name of the processor, and whether it has AVX-512."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, AVX-512: {'yes' if 'avx512f' in text else 'no'}"


def table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table. CPU seconds of all threads, which depend less on other work, are in brackets."""
    lines = [
        "| | values trained | train: compile | step | peak memory | predict: compile | image |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        train, predict = row["train"], row["predict"]
        cells = [
            f"{row['parameters'] / 1e6:.1f} M",
            f"{train['compile_seconds']:.1f} s ({train['compile_cpu_seconds']:.1f})",
            f"{train['median_seconds']:.3f} s ({train['median_cpu_seconds']:.3f})",
            f"{train['peak_gib']:.2f} GiB",
            f"{predict['compile_seconds']:.1f} s ({predict['compile_cpu_seconds']:.1f})",
            f"{predict['median_seconds']:.3f} s ({predict['median_cpu_seconds']:.3f})",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a toy network at 64x128, one round")
    parser.add_argument("--serve", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    """Measure all cases, group by group; with ``--serve``, run the process of one case."""
    args = parse()
    size = (64, 128) if args.quick else tuple(args.size)
    arch = Arch(variant="mindspore", dropout=0.0, **(TINY if args.quick else {"width": args.width}))
    if args.serve:
        serve(args.serve, arch, size)
        return
    load = os.getloadavg()
    arguments = ["--quick"] if args.quick else ["--width", str(args.width), "--size", *map(str, size)]
    groups = [[PUBLIC, OURS]] if args.quick else GROUPS
    found: dict[str, Any] = {}
    for group in groups:
        found |= measure(group, arguments, 1 if args.quick else args.rounds)
    compare(found)
    report = {
        "network": f"W{arch.width}, variant mindspore",
        "size": size,
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "versions": core_versions() | {"mindspore": version("mindspore")},
        "commit": git_commit(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "cases": found,
    }
    write_report(report, args.out)
    print(table(found))
    check(found)


if __name__ == "__main__":
    main()
