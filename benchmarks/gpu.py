"""One GPU, correctness first, then speed; prints one JSON document to keep under benchmarks/results/.

    python benchmarks/gpu.py --camvid FOLDER [--out FILE]
    python benchmarks/gpu.py --device_target CPU --size 64 128 --steps 1 --rounds 1      (to try the script itself)

1. The network against the authors' outputs (tests/data/official_w6) in float32 without TF32 and in float64.
2. `--mix True` training on CamVid with config/camvid_quick.yml, then evaluation, single scale and ms + flip.
3. W48 and W18 at 512x1024: images per second of training and prediction, float32 and mixed, the median of rounds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Noise, tell

from ocrnet import spec
from ocrnet.config import Config, Eval
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.torch.ocr import OCRNet
from ocrnet.passes import make_passes
from ocrnet.run import core_versions, git_commit
from ocrnet.spec import Arch
from ocrnet.world import World

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/data/official_w6"


def check_network(device: str) -> dict[str, float]:
    """Return the largest differences from the authors' eval outputs, per precision."""
    state = torch.load(FIXTURE / "state_dict.pth", weights_only=True)
    arch = Arch(width=6, channels=48, key_channels=24)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = OCRNet(arch).to(device, dtype).eval()
        model.load_state_dict({name: state[name].to(dtype) for name in spec.shapes(arch)})
        for case in ("case_a", "case_b"):
            wanted = torch.load(FIXTURE / f"{case}.pth", weights_only=True)
            with torch.inference_mode():
                aux, ocr = model(wanted["x"].to(device, dtype))
            for name, head in (("aux", aux), ("ocr", ocr)):
                found[f"{case} {name} {dtype}"] = (head.cpu().double() - wanted[name].double()).abs().max().item()
    worst = max(found.values())
    assert worst < 1e-4, f"the outputs are off by {worst}"
    return found


def train_camvid(folder: str, device_target: str) -> dict[str, object]:
    """Train and evaluate config/camvid_quick.yml through the public commands; return its time and scores."""
    with tempfile.TemporaryDirectory() as out:
        base = ["--config", str(ROOT / "config/camvid_quick.yml"), "--device_target", device_target, "--mix", "True"]
        data = ["--save_dir", out, "--set", f"data.dataset_dir={folder}"]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *base, *data], cwd=ROOT, check=True)
        seconds = time.perf_counter() - begun
        for more in ([], ["--multi_scale", "True", "--flip", "True"]):
            command = [sys.executable, "eval.py", *base, "--checkpoint_path", out, *more, *data]
            subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (Path(out) / "eval.jsonl").read_text().splitlines()]
    return {"seconds": seconds, "mean_iou": rows[0]["mean_iou"], "mean_iou_ms_flip": rows[1]["mean_iou"]}


def measure(args: argparse.Namespace, width: int, *, mix: bool, batch_size: int) -> dict[str, float]:
    """Return median images per second of training and of prediction (argmax at full size), and the peak memory."""
    arch = Arch(width=width)
    size, steps = tuple(args.size), args.steps
    cfg = Config(device_target=args.device_target, mix=mix, batch_size=batch_size, num_workers=0, total_step=10_000)
    engine = TorchEngine(cfg, arch, world=World(), stream=Noise(size, arch.channels))  # type: ignore[arg-type]
    engine.restore(spec.init(arch, 1), 0)
    engine.train(steps)
    trained, predicted = [], []
    images = np.repeat(Noise(size, 1).sample.image[None], batch_size, axis=0)
    passes = make_passes(Eval(), size)
    for _ in range(args.rounds):
        stats = engine.train(steps)
        trained.append(stats.samples / (stats.seconds - stats.data_seconds))
        begun = time.perf_counter()
        for _ in range(steps):
            engine.predict(images, passes)
        predicted.append(steps * batch_size / (time.perf_counter() - begun))
    memory = engine.train(1).memory_bytes / 2**30
    if args.device_target == "GPU":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"train": statistics.median(trained), "predict": statistics.median(predicted), "memory_gib": memory}


def main() -> None:
    """Run the three parts in order; a failed check ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", help="folder of CamVid; without it that part is left out")
    parser.add_argument("--device_target", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--widths", type=int, nargs="+", default=(48, 18))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name() if args.device_target == "GPU" else platform.processor(),
        "versions": core_versions() | {"torch": torch.__version__, "cuda": str(torch.version.cuda)},
        "python": platform.python_version(),
        "commit": git_commit(),
        "network_max_difference": check_network("cuda" if args.device_target == "GPU" else "cpu"),
        "camvid": train_camvid(args.camvid, args.device_target) if args.camvid else None,
    }
    torch.backends.cudnn.allow_tf32 = True
    report["images_per_second"] = {
        f"w{width} batch {batch_size} {'mix' if mix else 'float32'}": measure(
            args, width, mix=mix, batch_size=batch_size
        )
        for width in args.widths
        for mix in (True, False)
        for batch_size in (2, 8)
    }
    tell(report, args.out)


if __name__ == "__main__":
    main()
