"""Compare the loss fused with its upsampling with interpolation and F.cross_entropy, for one head: time and memory.

    python benchmarks/loss.py [--batch_size 2] [--size 512 1024] [--rounds 5] [--out FILE]

It runs forward and backward from logits at a quarter of the label size, both in turn, and reports medians. The memory
is, on a CPU, the growth of the peak memory of a new process, and on a GPU, PyTorch's peak allocation.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from common import write_report
from torch import Tensor

from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum
from ocrnet.tracking.run_dir import core_versions, git_commit

CLASSES = 19


def plain(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the loss as common toolboxes compute it."""
    up = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=True)
    return (F.cross_entropy(up, label.long(), reduction="none") * weight).sum()


def fused(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the loss as ours computes it."""
    return upsampled_cross_entropy_sum(logits, label, weight, align_corners=True)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "fused": fused}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits at a quarter of the size, labels, and their weights."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    logits = torch.randn(args.batch_size, CLASSES, height // 4, width // 4, generator=generator)
    label = torch.randint(0, CLASSES, (args.batch_size, height, width), generator=generator).to(torch.uint8)
    weight = torch.rand(label.shape, generator=generator)
    return logits.to(args.device).requires_grad_(), label.to(args.device), weight.to(args.device)


def seconds(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the seconds of one forward and backward pass."""
    tensors[0].grad = None
    started = time.perf_counter()
    LOSSES[name](*tensors).backward()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory_mib(name: str, args: argparse.Namespace) -> float:
    """Return the growth of peak memory by one pass, in MiB."""
    tensors = inputs(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(name, tensors)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = argparse.Namespace(**{**vars(args), "size": [32, 64]})
    seconds(name, inputs(small))  # loads the code and memory pools that every size needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak, which the imports may have set
    before = psutil.Process().memory_info().rss / 2**20
    seconds(name, tensors)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10 - before


def main() -> None:
    """Measure both losses in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.memory:
        print(memory_mib(args.memory, args))
        return
    tensors = inputs(args)
    gradients = {}
    for name in LOSSES:
        seconds(name, tensors)
        assert tensors[0].grad is not None
        gradients[name] = tensors[0].grad.clone()
    difference = ((gradients["fused"] - gradients["plain"]).norm() / gradients["plain"].norm()).item()
    rounds = [{name: seconds(name, tensors) for name in LOSSES} for _ in range(args.rounds)]
    ms = {name: 1000 * statistics.median(one[name] for one in rounds) for name in LOSSES}
    mib = {
        name: float(subprocess.run([sys.executable, *sys.argv, "--memory", name], check=True, stdout=-1).stdout)
        for name in LOSSES
    }
    report = {
        "versions": core_versions() | {"torch": torch.__version__, "threads": str(torch.get_num_threads())},
        "commit": git_commit(),
        "settings": {"batch_size": args.batch_size, "size": list(args.size), "device": args.device},
        "milliseconds": ms,
        "peak_mib": mib,
        "ratios": {"time": ms["fused"] / ms["plain"], "memory": mib["fused"] / mib["plain"]},
        "gradients_apart": difference,
    }
    write_report(json.loads(json.dumps(report)), args.out)


if __name__ == "__main__":
    main()
