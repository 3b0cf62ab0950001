"""One GPU, correctness first, then speed; prints a table and one JSON document to keep under benchmarks/results/.

    python benchmarks/gpu.py --camvid FOLDER [--camvid_config config/camvid_quick.yml] [--out FILE]
    python benchmarks/gpu.py --device_target CPU --toy [--out FILE]      (to try the script itself)

1. The network against the authors' outputs (tests/data/official_w6) in float32 without TF32 and in float64; the first
   training step's loss, with and without the fused norms, against the plain baseline's; the losses of a few steps taken
   by a CUDA graph against those of steps taken one by one.
2. Training of W48 at 512x1024 for several batch sizes, prediction of one image of 512x1024 and of 1024x2048, and W18:
   ours, also with the fused norms, as a CUDA graph, and both (``--compiled``: as a graph of what torch.compile made
   of the network), against plain.py (a) in float32, (b) with AMP, (c) with AMP and channels_last. In every round each
   way is built, warmed up, timed and taken down, in turn, so that each has the memory for itself. Images a second,
   milliseconds, seconds of warming up (and compiling), peak memory, kernels a step, and the share of the time that
   the operations alone would take at the pace of a large bfloat16 product on the same device ("of peak"; ours needs
   fewer operations than the network has, so it can pass 1).
3. `--mix True` training on CamVid through the public commands, then evaluation, single scale and ms + flip.

What no longer begins within ``--seconds`` is left out and listed, so that a call has an end.
"""

import argparse
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import Noise, tell
from plain import Plain
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ocrnet import architecture
from ocrnet.architecture import Arch, flops
from ocrnet.config import Config, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch import ocr
from ocrnet.engines.torch.cuda_graph import WARMUP
from ocrnet.engines.torch.dataloader import Batch, collate
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.torch.ocr import OCRNet
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions, git_commit
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/data/official_w6"
Size = tuple[int, int]


class Case(NamedTuple):
    """What is measured: a training step or a prediction of ``batch_size`` images of ``size`` by a network."""

    task: str
    width: int
    size: Size
    batch_size: int

    def __str__(self) -> str:
        return f"{self.task} W{self.width} {self.size[0]}x{self.size[1]} batch {self.batch_size}"


CASES = (
    *(Case("train", 48, (512, 1024), batch_size) for batch_size in (8, 2, 4, 16, 32)),
    Case("predict", 48, (1024, 2048), 1),
    Case("predict", 48, (512, 1024), 1),
    Case("predict", 48, (512, 1024), 8),
    Case("train", 18, (512, 1024), 8),
)
TOY = (Case("train", 16, (64, 64), 2), Case("predict", 16, (64, 64), 1))
GRAPH, COMPILED = "ours, cuda_graph", "ours, cuda_graph, compiled"
OPTIONS = ("ours, fused_norm", GRAPH, f"{GRAPH}, fused_norm")
WAYS = ("ours", *OPTIONS, "ours float32", "a: float32", "b: AMP", "c: AMP, channels_last")


def check_network(device: str) -> dict[str, float]:
    """Return the largest differences from the authors' eval outputs, per precision."""
    state = torch.load(FIXTURE / "state_dict.pth", weights_only=True)
    arch = Arch(width=6, channels=48, key_channels=24)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = OCRNet(arch).to(device, dtype).eval()
        model.load_state_dict({name: state[name].to(dtype) for name in architecture.shapes(arch)})
        for case in ("case_a", "case_b"):
            wanted = torch.load(FIXTURE / f"{case}.pth", weights_only=True)
            with torch.inference_mode():
                aux, ocr = model(wanted["x"].to(device, dtype))
            for name, head in (("aux", aux), ("ocr", ocr)):
                found[f"{case} {name} {dtype}"] = (head.cpu().double() - wanted[name].double()).abs().max().item()
    worst = max(found.values())
    assert worst < 1e-4, f"the outputs are off by {worst}"
    return found


def check_step(target: str) -> dict[str, float]:
    """Return the first step's loss in float32: ours, also with fused norms, and the plain baseline's; all agree."""
    arch, size = Arch(width=6, dropout=0.0), (64, 128)
    sample = Noise(size, 512).sample
    both = (np.repeat(array[None], 2, axis=0) for array in (sample.image, sample.label))
    found = {"plain": Plain(arch, device(target)).train(*both)}
    for name, fused_norm in (("ours", False), ("ours, fused_norm", True)):
        engine = ours(target, arch, size, 2, mix=False, fused_norm=fused_norm)
        found[name] = float(engine.train(1).loss[0] @ (0.4, 1.0))
        engine.close()
        assert abs(found[name] - found["plain"]) < 1e-4 * found["plain"], f"the losses are {found}"
    steps = {}
    for name in ("ours", GRAPH):
        engine = ours(target, arch, size, 2, mix=False, cuda_graph=name == GRAPH)
        steps[name] = engine.train(WARMUP + 3 if target == "GPU" else 1).loss @ (0.4, 1.0)
        engine.close()
    found["ours, last step"], found[f"{GRAPH}, last step"] = (float(loss[-1]) for loss in steps.values())
    assert np.allclose(steps["ours"], steps[GRAPH], rtol=1e-4), f"the losses are {steps}"
    return found


def device(target: str) -> str:
    """Return PyTorch's name of a device."""
    return "cuda" if target == "GPU" else "cpu"


def ours(target: str, arch: Arch, size: Size, batch_size: int, *, mix: bool, **options: bool) -> TorchEngine:
    """Return our engine with one batch that it trains on again and again: the loader is not what is measured."""
    cfg = Config(
        device_target=target,  # type: ignore[arg-type]
        mix=mix,
        batch_size=batch_size,
        num_workers=0,
        total_step=10_000,
        **options,  # type: ignore[arg-type]
    )
    engine = TorchEngine(cfg, arch, world=World(), stream=Noise(size, arch.channels))  # type: ignore[arg-type]
    engine.restore(architecture.init(arch, 1), 0)
    batch = collate([Noise(size, arch.channels).sample] * batch_size)
    assert isinstance(batch, Batch)
    if target == "GPU":
        batch = Batch(*(part.pin_memory() for part in batch[:3]), ())
    engine._batches = (batch for _ in itertools.count())
    return engine


def begin(way: str, case: Case, target: str) -> Callable[[int], object]:
    """Build one way of a case; return what takes a number of steps and waits for the last."""
    arch = Arch(width=case.width)
    sample = Noise(case.size, arch.channels).sample
    images, label = (np.repeat(array[None], case.batch_size, axis=0) for array in (sample.image, sample.label))
    if way.startswith("ours"):
        options = {name: name in way for name in ("fused_norm", "cuda_graph")}
        engine = ours(target, arch, case.size, case.batch_size, mix="float32" not in way, **options)
        if way == COMPILED:
            engine.model = torch.compile(engine.model, dynamic=False)  # type: ignore[assignment]
        if case.task == "train":
            return engine.train
        passes = make_passes(Eval(), case.size)
        return lambda steps: [engine.predict(images, passes) for _ in range(steps)]
    rival = Plain(arch, device(target), amp="AMP" in way, channels_last="channels_last" in way)
    given = tuple(torch.from_numpy(array) for array in (images, label))
    if target == "GPU":
        given = tuple(array.pin_memory() for array in given)
    if case.task == "train":
        return lambda steps: [rival.train(*given) for _ in range(steps)]
    return lambda steps: [rival.predict(given[0]) for _ in range(steps)]


def measure(way: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Return one round of one way: milliseconds a step, peak memory, and kernels a step."""
    on_gpu = args.device_target == "GPU"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call = begin(way, case, args.device_target)
    begun = time.perf_counter()
    call(args.warmup)
    warm = time.perf_counter()
    call(args.steps)
    found = {"ms": 1000 * (time.perf_counter() - warm) / args.steps, "seconds_before": warm - begun}
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        call(1)
    events = seen.events() or []
    found["kernels"] = sum(event.device_type == DeviceType.CUDA for event in events) if on_gpu else len(events)
    return found


def compare(case: Case, args: argparse.Namespace, peak: float, until: float) -> dict[str, object]:
    """Return all ways of a case: medians over rounds in turn, and the ratios to the rivals; see the module."""
    known = (*WAYS, COMPILED) if args.compiled else WAYS
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in known}
    failed: dict[str, str] = {}
    for _, way in itertools.product(range(args.rounds), known):
        if way in failed or (rounds[way] and time.monotonic() > until):
            continue
        if way in (*OPTIONS, COMPILED) and (case.task == "predict" or args.device_target == "CPU"):
            failed[way] = "in training on a GPU alone"
            continue
        try:
            rounds[way].append(measure(way, case, args))
        except (torch.OutOfMemoryError, OcrnetError) as error:
            failed[way] = str(error).splitlines()[0]
        gc.collect()
    arch = Arch(width=case.width)
    operations = (flops.train_flops if case.task == "train" else flops.forward_flops)(arch, case.size) * case.batch_size
    ways: dict[str, dict[str, object]] = {}
    for way, seen in rounds.items():
        if not seen:
            ways[way] = {"failed": failed.get(way, "no time left")}
            continue
        ms = statistics.median(one["ms"] for one in seen)
        ways[way] = {
            "ms": ms,
            "ms_of_rounds": [one["ms"] for one in seen],
            "seconds_before": max(one["seconds_before"] for one in seen),
            "images_per_second": 1000 * case.batch_size / ms,
            "of_peak": operations / (ms / 1000) / peak,
            **{key: max(one[key] for one in seen) for key in ("peak_gib", "kernels") if key in seen[0]},
        }
    mine = ways["ours"].get("ms")
    ratios = {way: ways[way]["ms"] / mine for way in ways if mine and "ms" in ways[way]}  # type: ignore[operator]
    return {"ways": ways, "times_as_fast_as": ratios}


def peaks(target: str) -> dict[str, float]:
    """Return the pace of a large bfloat16 product in FLOP/s, and of a large copy in bytes/s (read and written)."""
    size, numbers = (8192, 2**28) if target == "GPU" else (512, 2**22)
    square = torch.randn(size, size, device=device(target)).bfloat16()
    flat = torch.zeros(numbers, device=device(target))
    other = torch.empty_like(flat)

    def pace(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):
            begun = time.perf_counter()
            call()
            if target == "GPU":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return min(seconds[1:])

    return {
        "bfloat16_flops": 2 * size**3 / pace(lambda: square @ square),
        "bytes_per_second": 8 * numbers / pace(lambda: other.copy_(flat)),
    }


def train_camvid(folder: str, config: str, target: str) -> dict[str, object]:
    """Train and evaluate on CamVid through the public commands; return time and scores."""
    with tempfile.TemporaryDirectory() as out:
        base = ["--config", str(ROOT / config), "--device_target", target, "--mix", "True"]
        data = ["--save_dir", out, "--set", f"data.dataset_dir={folder}"]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *base, *data], cwd=ROOT, check=True)
        seconds = time.perf_counter() - begun
        for more in ([], ["--multi_scale", "True", "--flip", "True"]):
            command = [sys.executable, "eval.py", *base, "--checkpoint_path", out, *more, *data]
            subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (Path(out) / "eval.jsonl").read_text().splitlines()]
    return {"seconds": seconds, "mean_iou": rows[0]["mean_iou"], "mean_iou_ms_flip": rows[1]["mean_iou"]}


def table(speed: dict[str, dict]) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        "| | way | images/s | ms | peak GiB | kernels | of peak |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in speed.items():
        for way, row in found["ways"].items():
            if "failed" in row:
                lines.append(f"| {name} | {way} | {row['failed']} | | | | |")
                continue
            memory = f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""
            figures = f"{row['images_per_second']:.1f} | {row['ms']:.2f} | {memory} | {row['kernels']}"
            lines.append(f"| {name} | {way} | {figures} | {row['of_peak']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts in order; a failed check ends it."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", help="folder of CamVid; without it that part is left out")
    parser.add_argument("--camvid_config", default="config/camvid_quick.yml")
    parser.add_argument("--device_target", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--toy", action="store_true", help="a tiny network, one round: to try the script")
    parser.add_argument("--only", default="", help="cases whose name holds this, such as 'train W48'")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=WARMUP + 2)
    parser.add_argument("--compiled", action="store_true", help="a compiled network too, which takes minutes to make")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=540, help="no case or round begins after this")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.toy:
        args.steps, args.warmup, args.rounds = 1, 0, 1
    if args.compiled:  # its matrices are made on the CPU, which a graph cannot record
        ocr.conv_of_upsampled = torch.compiler.disable(ocr.conv_of_upsampled)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name() if args.device_target == "GPU" else platform.processor(),
        "versions": core_versions() | {"torch": torch.__version__, "cuda": str(torch.version.cuda)},
        "python": platform.python_version(),
        "commit": git_commit(),
        "network_max_difference": check_network(device(args.device_target)),
        "first_loss": check_step(args.device_target),
    }
    torch.backends.cudnn.allow_tf32 = True
    measured = peaks(args.device_target)
    speed: dict[str, dict] = {}
    left_out = []
    for case in TOY if args.toy else CASES:
        if args.only not in str(case):
            continue
        if time.monotonic() - begun > args.seconds:
            left_out.append(str(case))
            continue
        speed[str(case)] = compare(case, args, measured["bfloat16_flops"], begun + args.seconds)
        print(table({str(case): speed[str(case)]}), flush=True)
    report |= {"peaks": measured, "speed": speed, "left_out": left_out}
    report["camvid"] = train_camvid(args.camvid, args.camvid_config, args.device_target) if args.camvid else None
    tell(report, args.out)
    print(table(speed))


if __name__ == "__main__":
    main()
