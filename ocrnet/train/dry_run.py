"""`train --dry_run`: print the setup of a run and its cost, measured on a few real training steps; write no files."""

import dataclasses
import itertools
import logging
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
from ocrnet.train.setup import (
    arch_from_config,
    log_banner,
    make_stream,
    open_split,
    starting_state,
    with_dataset_classes,
)
from ocrnet.train.trainer import duration
from ocrnet.utils.log import RESULT

logger = logging.getLogger(__name__)

STEPS = 3  # training steps: one for warm-up, the others are measured
CHECKED_PAIRS = 50  # image and label pairs of each split that are validated


def dry_run(cfg: Config, *, world: World) -> list[str]:
    """Print the setup of a training run and its cost, measured on a few real training steps; write no files.

    Every rank validates the data and runs the steps. Only rank 0 prints. The steps are skipped if the data have
    problems.

    Args:
        cfg: The configuration.
        world: This process's rank and the number of ranks.

    Returns:
        The problems in the data, collected from all ranks.

    Raises:
        OcrnetError: The configuration or the data are invalid, or a step failed.
    """
    client.check(cfg.trackers)
    datasets = {split: open_split(cfg, split) for split in (("train", "val") if cfg.run_eval else ("train",))}
    train_set = datasets["train"]
    cfg = with_dataset_classes(cfg, len(train_set.classes))
    arch = arch_from_config(cfg, len(train_set.classes))
    tensors = starting_state(cfg, arch, None)
    engine_cfg = dataclasses.replace(cfg, total_step=max(cfg.total_step, STEPS))
    engine = open_engine(engine_cfg, arch, world=world, stream=make_stream(cfg, train_set, arch))
    try:
        with collectives.propagate_errors(engine):
            engine.restore(tensors, 0)
        _log(config_lines(cfg))
        log_banner(cfg, arch, engine, len(train_set))
        with collectives.propagate_errors(engine):
            summaries, own_problems = data_lines(datasets, cfg)
        problems = list(dict.fromkeys(itertools.chain.from_iterable(collectives.gather_strings(engine, own_problems))))
        _log([*summaries, *(f"problem: {problem}" for problem in problems)])
        if not problems:
            _log(size_lines(cfg, arch, engine))
            _log(cost_lines(cfg, engine))
    finally:
        engine.close()
    logger.info(
        "dry run: nothing was written" + (", except the downloaded files" if cfg.data_url or cfg.ckpt_url else "")
    )
    return problems


def _log(lines: Sequence[str]) -> None:
    for line in lines:
        logger.log(RESULT, line)


def config_lines(cfg: Config) -> list[str]:
    """Return the complete config, with defaults filled in, as lines of YAML."""
    text = yaml.safe_dump(config.as_dict(cfg), sort_keys=False, default_flow_style=None)
    return ["config:", *("  " + line for line in text.splitlines())]


def data_lines(datasets: dict[str, Dataset], cfg: Config) -> tuple[list[str], list[str]]:
    """Validate up to 50 evenly spaced pairs of each split; return one summary line per split, and the problems."""
    lines, problems = [], []
    for split, dataset in datasets.items():
        count = min(CHECKED_PAIRS, len(dataset))
        indices = [i * len(dataset) // count for i in range(count)]
        report = statistics.inspect(dataset, indices, workers=cfg.num_workers)
        problems += report.problems
        sizes = ", ".join(f"{height}x{width}" for (height, width), _ in report.sizes.most_common(3))
        lines.append(
            f"{split}: {len(dataset)} images, {report.read} of {count} checked are valid ({sizes or 'none'}); "
            "to check all: ocrnet check"
        )
    return lines, problems


def size_lines(cfg: Config, arch: Arch, engine: Engine) -> list[str]:
    """Return the costs that are computed from the configuration, without running a step.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        engine: The engine of this rank.

    Returns:
        Lines with the number of parameters, the checkpoint size, and the FLOPs of a forward pass and a training step.
    """
    size = cfg.data.crop_size
    forward = flops.forward_flops(arch, size)
    crops = cfg.batch_size * cfg.accumulate_steps * engine.world.size
    return [
        f"parameters: {architecture.num_parameters(arch) / 1e6:.2f} M; a checkpoint is about "
        f"{8 * architecture.num_parameters(arch) / 1e6:.0f} MB",
        f"forward pass of one {size[0]}x{size[1]} crop: {forward / 1e9:.1f} GFLOP; "
        f"a training step of {crops} crops: {crops * flops.train_flops(arch, size) / 1e12:.2f} TFLOP",
    ]


def cost_lines(cfg: Config, engine: Engine) -> list[str]:
    """Run one warm-up step and two measured steps; return lines with the memory and the estimated time of the run."""
    engine.train(1)
    stats = engine.train(STEPS - 1)
    seconds_per_step = stats.seconds / len(stats.finite)
    total_seconds = seconds_per_step * cfg.total_step
    return [
        f"memory: {stats.memory_bytes / 2**30:.2f} GiB in use after {STEPS} steps",
        f"time: {seconds_per_step:.2f} s a step (measured on {STEPS - 1} steps after one warm-up step), "
        f"about {duration(total_seconds)} for all {cfg.total_step} steps, without evaluations",
    ]
