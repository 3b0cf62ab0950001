"""Check the network on one GPU, then measure its speed; prints tables and one JSON document for benchmarks/results/.

    python benchmarks/gpu.py --camvid FOLDER [--camvid_config config/camvid_quick.yml] [--out FILE]
    python benchmarks/gpu.py --device_target CPU --toy [--out FILE]      (to test the script)

1. Correctness: the network's outputs equal the authors' (tests/data/official_w6) in float32 without TF32 and in
   float64; the loss of the first training step, with and without the fused norms, equals that of the plain baseline;
   the losses of a few steps in a CUDA graph equal those of separate steps.
2. Speed: training of W48 at 512x1024 with several batch sizes, prediction of images of 512x1024 and 1024x2048, and
   training of W18. Ours also runs with the fused norms, as a CUDA graph, with both, and (``--compiled``) as a CUDA
   graph of the torch.compile'd network. The baseline plain.py runs (a) in float32, (b) with AMP, (c) with AMP and
   channels_last. In every round each variant in turn is built, warmed up, timed and freed, so that no other variant
   uses memory. Measured: images per second, milliseconds, seconds of warm-up (and compilation), peak memory, kernels
   per step, and "of peak": the time that the network's operations would take at the speed of a large bfloat16 matrix
   product on the same device, as a share of the measured time. It can exceed 1, because ours needs fewer operations.
3. Accuracy: `--mix True` training on CamVid with the public commands, then evaluation at a single scale and at
   multiple scales with flip.

Cases and rounds that cannot begin within ``--seconds`` are skipped and listed.
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
from common import Noise, write_report
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
    """A measured case: a training step or a prediction of ``batch_size`` images of ``size``."""

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
VARIANTS = ("ours", *OPTIONS, "ours float32", "a: float32", "b: AMP", "c: AMP, channels_last")


def check_network(device: str) -> dict[str, float]:
    """Return the largest differences from the authors' eval outputs, per precision."""
    state = torch.load(FIXTURE / "state_dict.pth", weights_only=True)
    arch = Arch(width=6, channels=48, key_channels=24)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = OCRNet(arch).to(device, dtype).eval()
        model.load_state_dict({name: state[name].to(dtype) for name in architecture.shapes(arch)})
        for case in ("case_a", "case_b"):
            expected = torch.load(FIXTURE / f"{case}.pth", weights_only=True)
            with torch.inference_mode():
                aux, ocr = model(expected["x"].to(device, dtype))
            for name, head in (("aux", aux), ("ocr", ocr)):
                found[f"{case} {name} {dtype}"] = (head.cpu().double() - expected[name].double()).abs().max().item()
    worst = max(found.values())
    assert worst < 1e-4, f"the outputs differ by up to {worst}"
    return found


def check_step(target: str) -> dict[str, float]:
    """Check our float32 losses, with fused norms and in a CUDA graph, against the plain baseline; return all losses."""
    arch, size = Arch(width=6, dropout=0.0), (64, 128)
    sample = Noise(size, 512).sample
    batch = (np.repeat(array[None], 2, axis=0) for array in (sample.image, sample.label))
    found = {"plain": Plain(arch, device_name(target)).train(*batch)}
    for name, fused_norm in (("ours", False), ("ours, fused_norm", True)):
        engine = open_ours(target, arch, size, 2, mix=False, fused_norm=fused_norm)
        found[name] = float(engine.train(1).loss[0] @ (0.4, 1.0))
        engine.close()
        assert abs(found[name] - found["plain"]) < 1e-4 * found["plain"], f"the losses are {found}"
    steps = {}
    for name in ("ours", GRAPH):
        engine = open_ours(target, arch, size, 2, mix=False, cuda_graph=name == GRAPH)
        steps[name] = engine.train(WARMUP + 3 if target == "GPU" else 1).loss @ (0.4, 1.0)
        engine.close()
    found["ours, last step"], found[f"{GRAPH}, last step"] = (float(loss[-1]) for loss in steps.values())
    assert np.allclose(steps["ours"], steps[GRAPH], rtol=1e-4), f"the losses are {steps}"
    return found


def device_name(target: str) -> str:
    """Return PyTorch's name of the device."""
    return "cuda" if target == "GPU" else "cpu"


def open_ours(target: str, arch: Arch, size: Size, batch_size: int, *, mix: bool, **options: bool) -> TorchEngine:
    """Return our engine, which trains on one batch repeatedly, so that no loader time is measured."""
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


def build(variant: str, case: Case, target: str) -> Callable[[int], object]:
    """Build one variant of a case; return a function that runs a number of steps and waits for the last one."""
    arch = Arch(width=case.width)
    sample = Noise(case.size, arch.channels).sample
    images, label = (np.repeat(array[None], case.batch_size, axis=0) for array in (sample.image, sample.label))
    if variant.startswith("ours"):
        options = {name: name in variant for name in ("fused_norm", "cuda_graph")}
        engine = open_ours(target, arch, case.size, case.batch_size, mix="float32" not in variant, **options)
        if variant == COMPILED:
            engine.model = torch.compile(engine.model, dynamic=False)  # type: ignore[assignment]
        if case.task == "train":
            return engine.train
        passes = make_passes(Eval(), case.size)
        return lambda steps: [engine.predict(images, passes) for _ in range(steps)]
    baseline = Plain(arch, device_name(target), amp="AMP" in variant, channels_last="channels_last" in variant)
    inputs = tuple(torch.from_numpy(array) for array in (images, label))
    if target == "GPU":
        inputs = tuple(array.pin_memory() for array in inputs)
    if case.task == "train":
        return lambda steps: [baseline.train(*inputs) for _ in range(steps)]
    return lambda steps: [baseline.predict(inputs[0]) for _ in range(steps)]


def measure(variant: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Measure one round of one variant; return milliseconds per step, peak memory and kernels per step."""
    on_gpu = args.device_target == "GPU"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call = build(variant, case, args.device_target)
    started = time.perf_counter()
    call(args.warmup)
    warm = time.perf_counter()
    call(args.steps)
    found = {"ms": 1000 * (time.perf_counter() - warm) / args.steps, "seconds_before": warm - started}
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call(1)
    events = profiler.events() or []
    found["kernels"] = sum(event.device_type == DeviceType.CUDA for event in events) if on_gpu else len(events)
    return found


def compare(case: Case, args: argparse.Namespace, peak: float, until: float) -> dict[str, object]:
    """Measure all variants of a case in turn; return medians over the rounds, and ratios to our engine."""
    known = (*VARIANTS, COMPILED) if args.compiled else VARIANTS
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in known}
    failed: dict[str, str] = {}
    for _, variant in itertools.product(range(args.rounds), known):
        if variant in failed or (rounds[variant] and time.monotonic() > until):
            continue
        if variant in (*OPTIONS, COMPILED) and (case.task == "predict" or args.device_target == "CPU"):
            failed[variant] = "only for training on a GPU"
            continue
        try:
            rounds[variant].append(measure(variant, case, args))
        except (torch.OutOfMemoryError, OcrnetError) as error:
            failed[variant] = str(error).splitlines()[0]
        gc.collect()
    arch = Arch(width=case.width)
    operations = (flops.train_flops if case.task == "train" else flops.forward_flops)(arch, case.size) * case.batch_size
    results: dict[str, dict[str, object]] = {}
    for variant, measured in rounds.items():
        if not measured:
            results[variant] = {"failed": failed.get(variant, "no time left")}
            continue
        ms = statistics.median(one["ms"] for one in measured)
        results[variant] = {
            "ms": ms,
            "ms_of_rounds": [one["ms"] for one in measured],
            "seconds_before": max(one["seconds_before"] for one in measured),
            "images_per_second": 1000 * case.batch_size / ms,
            "of_peak": operations / (ms / 1000) / peak,
            **{key: max(one[key] for one in measured) for key in ("peak_gib", "kernels") if key in measured[0]},
        }
    our_ms = results["ours"].get("ms")
    ratios = {variant: results[variant]["ms"] / our_ms for variant in results if our_ms and "ms" in results[variant]}  # type: ignore[operator]
    return {"ways": results, "times_as_fast_as": ratios}


def peaks(target: str) -> dict[str, float]:
    """Return the speed of a large bfloat16 matrix product in FLOP/s, and of a large copy in bytes/s, read + written."""
    size, numbers = (8192, 2**28) if target == "GPU" else (512, 2**22)
    square = torch.randn(size, size, device=device_name(target)).bfloat16()
    flat = torch.zeros(numbers, device=device_name(target))
    other = torch.empty_like(flat)

    def shortest_seconds(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            call()
            if target == "GPU":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    return {
        "bfloat16_flops": 2 * size**3 / shortest_seconds(lambda: square @ square),
        "bytes_per_second": 8 * numbers / shortest_seconds(lambda: other.copy_(flat)),
    }


def train_camvid(folder: str, config: str, target: str) -> dict[str, object]:
    """Train and evaluate on CamVid with the public commands; return the training time and the scores."""
    with tempfile.TemporaryDirectory() as out:
        base = ["--config", str(ROOT / config), "--device_target", target, "--mix", "True"]
        data = ["--save_dir", out, "--set", f"data.dataset_dir={folder}"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *base, *data], cwd=ROOT, check=True)
        seconds = time.perf_counter() - started
        for flags in ([], ["--multi_scale", "True", "--flip", "True"]):
            command = [sys.executable, "eval.py", *base, "--checkpoint_path", out, *flags, *data]
            subprocess.run(command, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (Path(out) / "eval.jsonl").read_text().splitlines()]
    return {"seconds": seconds, "mean_iou": rows[0]["mean_iou"], "mean_iou_ms_flip": rows[1]["mean_iou"]}


def table(speed: dict[str, dict]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| | variant | images/s | ms | peak GiB | kernels | of peak |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in speed.items():
        for variant, row in found["ways"].items():
            if "failed" in row:
                lines.append(f"| {name} | {variant} | {row['failed']} | | | | |")
                continue
            memory = f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""
            cells = f"{row['images_per_second']:.1f} | {row['ms']:.2f} | {memory} | {row['kernels']}"
            lines.append(f"| {name} | {variant} | {cells} | {row['of_peak']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the three parts in order; a failed check stops the script."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", help="folder of CamVid; without it part 3 is skipped")
    parser.add_argument("--camvid_config", default="config/camvid_quick.yml")
    parser.add_argument("--device_target", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--toy", action="store_true", help="a tiny network and one round, to test the script")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this, such as 'train W48'")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=WARMUP + 2)
    parser.add_argument(
        "--compiled", action="store_true", help="also measure a compiled network; compiling takes minutes"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=540, help="start no case or round after this time")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.toy:
        args.steps, args.warmup, args.rounds = 1, 0, 1
    if args.compiled:  # it creates matrices on the CPU, which a CUDA graph cannot record
        ocr.conv_of_upsampled = torch.compiler.disable(ocr.conv_of_upsampled)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name() if args.device_target == "GPU" else platform.processor(),
        "versions": core_versions() | {"torch": torch.__version__, "cuda": str(torch.version.cuda)},
        "python": platform.python_version(),
        "commit": git_commit(),
        "network_max_difference": check_network(device_name(args.device_target)),
        "first_loss": check_step(args.device_target),
    }
    torch.backends.cudnn.allow_tf32 = True
    measured = peaks(args.device_target)
    speed: dict[str, dict] = {}
    left_out = []
    for case in TOY if args.toy else CASES:
        if args.only not in str(case):
            continue
        if time.monotonic() - started > args.seconds:
            left_out.append(str(case))
            continue
        speed[str(case)] = compare(case, args, measured["bfloat16_flops"], started + args.seconds)
        print(table({str(case): speed[str(case)]}), flush=True)
    report |= {"peaks": measured, "speed": speed, "left_out": left_out}
    report["camvid"] = train_camvid(args.camvid, args.camvid_config, args.device_target) if args.camvid else None
    write_report(report, args.out)
    print(table(speed))


if __name__ == "__main__":
    main()
