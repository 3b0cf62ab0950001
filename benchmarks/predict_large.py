"""Measure peak memory and time of `ocrnet predict` for a small image, a very large one and a video; prints JSON.

python benchmarks/predict_large.py [--size 8000 20000] [--frames 300] [--max_memory 1.0] [--out FILE]

Each prediction runs in a process of its own, with a small network of random weights, so that the memory of reading,
tiling and writing dominates over that of the network (`eval.max_memory`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from common import write_report

from ocrnet import architecture, config
from ocrnet.architecture import Arch
from ocrnet.config import Config
from ocrnet.data.datasets.street import scene
from ocrnet.data.image_io import write_png_rows
from ocrnet.predict import video
from ocrnet.tracking.run_dir import core_versions, git_commit
from ocrnet.weights import checkpoint

ARCH = Arch(width=18, blocks=1, modules=(1, 1, 1), num_classes=4, channels=32, key_channels=16)
SMALL = (256, 512)
ALL_KINDS = "overlay,indices,color,side,confidence,json"


def write_inputs(folder: Path, size: tuple[int, int], frames: int, frame: tuple[int, int]) -> None:
    """Write a checkpoint, the two images and the video; runs in a process whose memory is not measured."""
    tensors = architecture.init(ARCH, 1)
    meta = {"config": config.as_dict(Config()), "step": 0, "num_classes": ARCH.num_classes}
    meta["arch"] = {name: getattr(ARCH, name) for name in ("width", "blocks", "modules", "channels", "key_channels")}
    checkpoint.save(folder / "net.safetensors", tensors, meta)
    rng = np.random.default_rng(0)
    image = scene.draw((500, 1000), rng, index=0)[0]
    image = cv2.add(image, rng.integers(0, 12, image.shape, np.uint8))

    def rows(height: int, width: int):  # type: ignore[no-untyped-def]
        for top in range(0, height, 500):
            wide = np.tile(image, (1, -(-width // 1000), 1))[: min(500, height - top), :width]
            yield np.ascontiguousarray(wide)

    write_png_rows(folder / "small.png", SMALL, rows(*SMALL))
    write_png_rows(folder / "large.png", size, rows(*size))
    with video.Writer(folder / "film.mp4", 25) as film:
        for i in range(frames):
            film.write(np.ascontiguousarray(np.roll(image, 8 * i, axis=1)[: frame[0], : frame[1]]))
        film.finish()


def predict(folder: Path, source: str, max_memory: float, save: str | None) -> dict[str, float | int | str]:
    """Run `ocrnet predict` once; return its peak memory, its seconds and the line that it prints."""
    command = [sys.executable, "-m", "ocrnet", "predict", str(folder / source), "--checkpoint_path"]
    command += [str(folder / "net.safetensors"), "--device_target", "CPU", "--output", str(folder / "out")]
    command += ["--set", f"eval.max_memory={max_memory}", *(["--save", save] if save else [])]
    started = time.perf_counter()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    text = (folder / "output.txt").read_text()
    assert status == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("[1/1]")]
    return {"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20, "output": line.replace(f"{folder}/", "")}


def main() -> None:
    """Write the inputs, and measure the prediction of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(8000, 20000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frame", type=int, nargs=2, default=(360, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--max_memory", type=float, default=1.0)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.make:
        write_inputs(Path(args.make), tuple(args.size), args.frames, tuple(args.frame))
        return
    report: dict[str, object] = {
        "max_memory_gib": args.max_memory,
        "versions": core_versions(),
        "commit": git_commit(),
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *sys.argv, "--make", folder], check=True)
        cases = {
            "small image": ("small.png", None),
            "large image": ("large.png", ALL_KINDS),
            "video": ("film.mp4", None),
        }
        for name, (source, save) in cases.items():
            report["cases"] |= {name: predict(Path(folder), source, args.max_memory, save)}  # type: ignore[operator]
    write_report(report, args.out)


if __name__ == "__main__":
    main()
