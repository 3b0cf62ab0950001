"""`train --dry_run`: what a run would do and cost, measured on real steps; nothing is written."""

import yaml

from ocrnet import architecture, config
from ocrnet.architecture import Arch, flops
from ocrnet.config import Config
from ocrnet.data import statistics
from ocrnet.data.datasets import Dataset
from ocrnet.engines.base import Engine
from ocrnet.train.trainer import duration

STEPS = 3
LOOKED_AT = 50


def lines_of_config(cfg: Config) -> list[str]:
    """Return the resolved config as lines of YAML."""
    text = yaml.safe_dump(config.as_dict(cfg), sort_keys=False, default_flow_style=None)
    return ["config:", *("  " + line for line in text.splitlines())]


def lines_of_data(datasets: dict[str, Dataset], cfg: Config) -> tuple[list[str], list[str]]:
    """Read up to 50 pairs of each split, evenly spread; return what was seen, and the problems."""
    lines, problems = [], []
    for split, dataset in datasets.items():
        count = min(LOOKED_AT, len(dataset))
        indices = [i * len(dataset) // count for i in range(count)]
        report = statistics.inspect(dataset, indices, workers=cfg.num_workers)
        problems += report.problems
        sizes = ", ".join(f"{height}x{width}" for (height, width), _ in report.sizes.most_common(3))
        lines.append(
            f"{split}: {len(dataset)} images, {report.read} of {count} looked at are sound ({sizes or 'none'}); "
            "all of them: ocrnet check"
        )
    return lines, problems


def lines_of_size(cfg: Config, arch: Arch, engine: Engine) -> list[str]:
    """Return what is known of the cost before any step is taken."""
    size = cfg.data.crop_size
    forward = flops.forward_flops(arch, size)
    crops = cfg.batch_size * cfg.accumulate_steps * engine.world.size
    return [
        f"parameters: {architecture.num_parameters(arch) / 1e6:.2f} M; a checkpoint is about "
        f"{8 * architecture.num_parameters(arch) / 1e6:.0f} MB",
        f"forward of one {size[0]}x{size[1]} crop: {forward / 1e9:.1f} GFLOP; "
        f"a step of {crops} crops: {crops * flops.train_flops(arch, size) / 1e12:.2f} TFLOP",
    ]


def lines_of_cost(cfg: Config, engine: Engine) -> list[str]:
    """Take a step to warm up and two that are measured; return the memory and time that the run needs."""
    engine.train(1)
    stats = engine.train(STEPS - 1)
    pace = stats.seconds / len(stats.finite)
    total = pace * cfg.total_step
    return [
        f"memory: {stats.memory_bytes / 2**30:.2f} GiB in use after {STEPS} steps",
        f"time: {pace:.2f} s a step (measured on {STEPS - 1}, after one to warm up), "
        f"so about {duration(total)} for {cfg.total_step} steps, evaluations left out",
    ]
