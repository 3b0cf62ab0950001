"""`train --dry_run`: show the setup and the cost of a run, measured on real steps, without writing anything."""

import dataclasses
import itertools
from collections.abc import Sequence

import yaml

from ocrnet import architecture, config
from ocrnet.architecture import Arch, flops
from ocrnet.config import Config
from ocrnet.data import statistics
from ocrnet.data.datasets import Dataset
from ocrnet.distributed.launcher import World
from ocrnet.engines import collectives
from ocrnet.engines.base import Engine
from ocrnet.engines.factory import open_engine
from ocrnet.tracking.services import client
from ocrnet.train.setup import arch_of, banner, make_stream, open_split, resolved, starting_state
from ocrnet.train.trainer import duration

STEPS = 3
LOOKED_AT = 50


def dry_run(cfg: Config, *, notes: list[str], world: World) -> list[str]:
    """Print the setup and the cost of a training run, measured on real steps, without writing anything.

    Every rank validates the data and runs the steps; rank 0 prints.

    Args:
        cfg: The configuration.
        notes: Further lines to print.
        world: The ranks of the run.

    Returns:
        The problems found in the data, of all ranks.
    """
    say = _print if world.rank == 0 else _ignore
    client.check(cfg.trackers)
    datasets = {split: open_split(cfg, split) for split in (("train", "val") if cfg.run_eval else ("train",))}
    train_set = datasets["train"]
    cfg = resolved(cfg, len(train_set.classes))
    arch = arch_of(cfg, len(train_set.classes))
    tensors, report = starting_state(cfg, arch, None)
    enough = dataclasses.replace(cfg, total_step=max(cfg.total_step, STEPS))
    engine = open_engine(enough, arch, world=world, stream=make_stream(cfg, train_set, arch))
    try:
        with collectives.propagate_errors(engine):
            engine.restore(tensors, 0)
        say([*lines_of_config(cfg), *banner(cfg, arch, engine, len(train_set)), *report, *notes])
        with collectives.propagate_errors(engine):
            seen, own = lines_of_data(datasets, cfg)
        problems = list(dict.fromkeys(itertools.chain.from_iterable(collectives.gather_strings(engine, own))))
        say([*seen, *(f"problem: {problem}" for problem in problems)])
        if not problems:
            say(lines_of_size(cfg, arch, engine))
            say(lines_of_cost(cfg, engine))
    finally:
        engine.close()
    say(["dry run: nothing was written" + (", except the downloaded files" if cfg.data_url or cfg.ckpt_url else "")])
    return problems


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def _ignore(lines: Sequence[str]) -> None:
    pass


def lines_of_config(cfg: Config) -> list[str]:
    """Return the resolved config as lines of YAML."""
    text = yaml.safe_dump(config.as_dict(cfg), sort_keys=False, default_flow_style=None)
    return ["config:", *("  " + line for line in text.splitlines())]


def lines_of_data(datasets: dict[str, Dataset], cfg: Config) -> tuple[list[str], list[str]]:
    """Read up to 50 evenly spaced pairs of each split; return a summary line per split, and the problems."""
    lines, problems = [], []
    for split, dataset in datasets.items():
        count = min(LOOKED_AT, len(dataset))
        indices = [i * len(dataset) // count for i in range(count)]
        report = statistics.inspect(dataset, indices, workers=cfg.num_workers)
        problems += report.problems
        sizes = ", ".join(f"{height}x{width}" for (height, width), _ in report.sizes.most_common(3))
        lines.append(
            f"{split}: {len(dataset)} images, {report.read} of {count} checked are valid ({sizes or 'none'}); "
            "to check all: ocrnet check"
        )
    return lines, problems


def lines_of_size(cfg: Config, arch: Arch, engine: Engine) -> list[str]:
    """Return the part of the cost that is known before the first step.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        engine: The engine of this rank.

    Returns:
        Lines with the number of parameters, the checkpoint size, and the FLOPs of a forward pass and of a step.
    """
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
    """Run one warm-up step and two measured steps; return lines with the memory and time that the run needs."""
    engine.train(1)
    stats = engine.train(STEPS - 1)
    pace = stats.seconds / len(stats.finite)
    total = pace * cfg.total_step
    return [
        f"memory: {stats.memory_bytes / 2**30:.2f} GiB in use after {STEPS} steps",
        f"time: {pace:.2f} s a step (measured on {STEPS - 1} steps after one warm-up step), "
        f"so about {duration(total)} for {cfg.total_step} steps, without evaluations",
    ]
