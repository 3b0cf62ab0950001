"""Our MindSpore engine on this CPU against the relative's way (mindspore_rival.py): compile time, step, memory.

python benchmarks/mindspore_cpu.py [--width 32] [--size 128 256] [--rounds 3] [--out FILE]
python benchmarks/mindspore_cpu.py --quick      (a toy network, the relative and ours alone: to try the script)

Each case is a process of its own. Those of a group first compile, one after another with the others idle, and then
take their turns, A B C A B C. All begin with the same weights and see the same crop, so that their first losses must
agree: the script ends with an error where they do not.
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
from common import Noise, tell

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data, Eval, Optimizer
from ocrnet.distributed.launcher import World
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions, git_commit

ISA = "ONEDNN_MAX_CPU_ISA"
QUIET = {"GLOG_v": "3"}
RELATIVE, SWITCHED, OURS = "relative", f"relative, {ISA}=AVX2", "ours"
OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, ms_mode: pynative": {"ms_mode": "pynative"},
    "ours, --mix True": {"mix": True},
}
GROUPS = [[RELATIVE, SWITCHED, OURS], ["ours, ms_mode: pynative", "ours, --mix True"]]
CLASS_WEIGHTS = tuple(0.8 + 0.02 * number for number in range(19))
TINY = {"width": 4, "blocks": 1, "modules": (1, 1, 1), "channels": 32, "key_channels": 16}
Calls = dict[str, Callable[[], Any]]


def config(size: tuple[int, int], **options: Any) -> Config:
    """The recipe of both: as the relative has it, without the warmup, so that the first step already moves weights."""
    data = Data(crop_size=size, class_weights=CLASS_WEIGHTS)
    how = Optimizer(decay="no_norm")
    return Config(
        engine="mindspore",
        device_target="CPU",
        num_classes=19,
        batch_size=1,
        num_workers=0,
        warmup_step=0,
        data=data,
        optimizer=how,
        **options,
    )


def noise(arch: Arch, size: tuple[int, int]) -> Noise:
    """One crop, an eighth of it unlabeled."""
    stream = Noise(size, architecture.head_channels(arch))
    stream.sample.label[: size[0] // 8] = 255
    return stream


def first_state(arch: Arch) -> dict[str, np.ndarray]:
    """Fresh weights, the two biases that the relative lacks at 0."""
    state: dict[str, np.ndarray] = dict(architecture.init(arch, 1))
    for name in ("conv3x3_ocr.0.bias", "aux_head.0.bias"):
        state[name] = np.zeros_like(state[name])
    return state


def open_rival(arch: Arch, size: tuple[int, int]) -> tuple[Calls, int]:
    """The relative's calls, and how many values it trains."""
    from mindspore_rival import Rival, inputs

    sample = noise(arch, size).sample
    rival = Rival(arch, config(size))
    rival.restore(first_state(arch))
    x, label = inputs(sample.image[None], sample.label[None])
    return {"train": lambda: rival.train(x, label), "predict": lambda: rival.predict(x)}, rival.parameters()


def open_ours(arch: Arch, size: tuple[int, int], options: Mapping[str, Any]) -> tuple[Calls, int]:
    """Our calls, and how many values we train."""
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
    """Be the process of one case: answer each line of stdin, a call's name, with its seconds, result and memory."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    calls, parameters = open_rival(arch, size) if case not in OPTIONS else open_ours(arch, size, OPTIONS[case])
    for line in sys.stdin:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        found = calls[line.strip()]()
        answer = {
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - begun_cpu,
            "result": found if isinstance(found, float) else np.bincount(found.reshape(-1), minlength=19).tolist(),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "parameters": parameters,
        }
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # MindSpore has much to say at a regular end


class Case:
    """The process of one case, seen from outside, with what it answered so far."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.answers: dict[str, list[dict[str, Any]]] = {"train": [], "predict": []}
        environment = {key: value for key, value in os.environ.items() if key != ISA} | QUIET
        if name == SWITCHED:
            environment[ISA] = "AVX2"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def call(self, what: str) -> None:
        """Let it train or predict once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with status {self.process.wait()}")
        self.answers[what].append(json.loads(line))

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def report(self) -> dict[str, Any]:
        """The figures: the first call apart from the second, which still warms up, and from those after it."""
        found: dict[str, Any] = {"parameters": self.answers["train"][0]["parameters"]}
        for what, answers in self.answers.items():
            found[what] = {"peak_gib": answers[-1]["peak_gib"]}
            for key in ("seconds", "cpu_seconds"):
                first, _, *steady = [one[key] for one in answers]
                median = statistics.median(steady)
                found[what] |= {f"compile_{key}": first - median, f"median_{key}": median, key: steady}
        found["losses"] = [one["result"] for one in self.answers["train"]]
        found["predicted"] = self.answers["predict"][-1]["result"]
        return found


def measure(names: list[str], arguments: list[str], rounds: int) -> dict[str, Any]:
    """Measure the cases of a group."""
    cases: list[Case] = []
    try:
        for name in names:
            cases.append(Case(name, arguments))
            cases[-1].call("train")
            cases[-1].call("train")
        for what in ("train", "predict"):
            for case in cases if what == "predict" else ():
                case.call(what)
                case.call(what)
            for _ in range(rounds):
                for case in cases:
                    case.call(what)
        return {case.name: case.report() for case in cases}
    finally:
        for case in cases:
            case.end()


def compare(found: Mapping[str, Any]) -> None:
    """Put how many pixels fall into our classes, of the network trained so far, in the place of each class's number."""
    wanted = np.array(found[OURS]["predicted"])
    for row in found.values():
        row["predicted_as_ours"] = float(np.minimum(row.pop("predicted"), wanted).sum() / wanted.sum())


def check(found: Mapping[str, Any]) -> None:
    """See that all trained the same network: the first loss alike, and the second, which the first update made."""
    wanted = found[OURS]["losses"]
    for name, row in found.items():
        losses = row["losses"]
        apart = [abs(one / two - 1) for one, two in zip(losses[:2], wanted[:2], strict=True)]
        allowed = (5e-3, 5e-2) if "mix" in name else (1e-4, 1e-3)
        if not np.isfinite(losses).all() or any(a > most for a, most in zip(apart, allowed, strict=True)):
            raise SystemExit(f"{name}: not the network or the step that ours is: losses {losses}, ours {wanted}")


def cpu() -> str:
    """The processor's name, and whether it has AVX-512."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, AVX-512: {'yes' if 'avx512f' in text else 'no'}"


def table(found: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown, CPU seconds of all threads in brackets: other work lengthens those less."""
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
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a toy network at 64x128, one round")
    parser.add_argument("--serve", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    return parser.parse_args()


def main() -> None:
    """Measure all cases, group by group, or be one of them."""
    args = parse()
    size = (64, 128) if args.quick else tuple(args.size)
    arch = Arch(variant="mindspore", dropout=0.0, **(TINY if args.quick else {"width": args.width}))
    if args.serve:
        serve(args.serve, arch, size)
        return
    load = os.getloadavg()
    arguments = ["--quick"] if args.quick else ["--width", str(args.width), "--size", *map(str, size)]
    groups = [[RELATIVE, OURS]] if args.quick else GROUPS
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
    tell(report, args.out)
    print(table(found))
    check(found)


if __name__ == "__main__":
    main()
