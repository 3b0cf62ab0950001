"""The loss of one head, fused with its upsampling, against interpolating and F.cross_entropy: time and memory.

    python benchmarks/loss.py [--batch_size 2] [--size 512 1024] [--rounds 5] [--out FILE]

Forward and backward from logits at a quarter of the size. A B A B, medians. On a CPU the memory is what a fresh process
of each way grows by; on a GPU what PyTorch allocated at most.
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
from common import tell
from torch import Tensor

from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum
from ocrnet.tracking.run_dir import core_versions, git_commit

CLASSES = 19


def plain(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the loss as toolboxes compute it."""
    up = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=True)
    return (F.cross_entropy(up, label.long(), reduction="none") * weight).sum()


def fused(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return ours."""
    return upsampled_cross_entropy_sum(logits, label, weight, align_corners=True)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "fused": fused}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits at a quarter of the size, labels, and their weights."""
    made = torch.Generator().manual_seed(0)
    height, width = args.size
    logits = torch.randn(args.batch_size, CLASSES, height // 4, width // 4, generator=made)
    label = torch.randint(0, CLASSES, (args.batch_size, height, width), generator=made).to(torch.uint8)
    weight = torch.rand(label.shape, generator=made)
    return logits.to(args.device).requires_grad_(), label.to(args.device), weight.to(args.device)


def seconds(way: str, given: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return what one forward and backward pass takes."""
    given[0].grad = None
    begun = time.perf_counter()
    WAYS[way](*given).backward()
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def memory_mib(way: str, args: argparse.Namespace) -> float:
    """Return by how much one pass raises the peak memory."""
    given = inputs(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(way, given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = argparse.Namespace(**{**vars(args), "size": [32, 64]})
    seconds(way, inputs(small))  # code and pools that every size needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of the imports is forgotten
    before = psutil.Process().memory_info().rss / 2**20
    seconds(way, given)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10 - before


def main() -> None:
    """Measure both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.memory:
        print(memory_mib(args.memory, args))
        return
    given = inputs(args)
    gradients = {}
    for way in WAYS:
        seconds(way, given)
        assert given[0].grad is not None
        gradients[way] = given[0].grad.clone()
    apart = ((gradients["fused"] - gradients["plain"]).norm() / gradients["plain"].norm()).item()
    rounds = [{way: seconds(way, given) for way in WAYS} for _ in range(args.rounds)]
    ms = {way: 1000 * statistics.median(one[way] for one in rounds) for way in WAYS}
    mib = {
        way: float(subprocess.run([sys.executable, *sys.argv, "--memory", way], check=True, stdout=-1).stdout)
        for way in WAYS
    }
    report = {
        "versions": core_versions() | {"torch": torch.__version__, "threads": str(torch.get_num_threads())},
        "commit": git_commit(),
        "settings": {"batch_size": args.batch_size, "size": list(args.size), "device": args.device},
        "milliseconds": ms,
        "peak_mib": mib,
        "ratios": {"time": ms["fused"] / ms["plain"], "memory": mib["fused"] / mib["plain"]},
        "gradients_apart": apart,
    }
    tell(json.loads(json.dumps(report)), args.out)


if __name__ == "__main__":
    main()
