"""Measure the peak memory of the evaluation of one image on the CPU, each case in its own process; prints JSON.

python benchmarks/memory.py [--width 48] [--size 1024 2048] [--out FILE]
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from common import write_report

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import EVAL_SCALES, Config, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions, git_commit

CASES = {"single scale": Eval(), "six scales + flip": Eval(scales=EVAL_SCALES, flip=True)}


def measure(width: int, size: tuple[int, int], case: str, mix: bool) -> dict[str, float]:
    """Evaluate one image of noise; return the peak memory of the process before and after, and the seconds."""
    arch = Arch(width=width)
    engine = open_engine(Config(device_target="CPU", mix=mix), arch, world=World())
    engine.restore(architecture.init(arch, 1), 0)
    before = _peak()
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    started = time.perf_counter()
    engine.predict(image, make_passes(CASES[case], size))
    return {"before_gib": before, "peak_gib": _peak(), "seconds": time.perf_counter() - started}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run every case in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "MIX"), help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.width, tuple(args.size), args.one[0], args.one[1] == "True")))
        return
    base = [sys.executable, __file__, "--width", str(args.width), "--size", *map(str, args.size), "--one"]
    report: dict[str, object] = {
        "network": f"W{args.width}",
        "image_size": list(args.size),
        "versions": core_versions(),
        "commit": git_commit(),
    }
    for case in CASES:
        for mix in (False, True):
            completed = subprocess.run([*base, case, str(mix)], capture_output=True, text=True, check=True)
            report[f"{case}, {'mix' if mix else 'float32'}"] = json.loads(completed.stdout)
    write_report(report, args.out)


if __name__ == "__main__":
    main()
