"""Learning rate schedules: an array with the learning rate of every step of a run."""

import numpy as np

from ocrnet.config import Config


def table(cfg: Config, ranks: int = 1) -> np.ndarray:
    """Return the learning rate of every step on ``ranks`` ranks, float64 of shape (total_step,).

    The warmup rises linearly from ``end_lr`` to ``lr_init``, as in the MindSpore implementation. After it, the schedule
    ``linear`` falls linearly to ``end_lr``. The schedule ``poly`` is lr_init * (1 - progress)^power, as in the code of
    the HRNet-OCR authors, but at least ``end_lr``. With ``lr_scale: linear``, all values are multiplied by the global
    batch size divided by ``base_batch_size`` (Goyal et al., 2017).
    """
    steps = np.arange(cfg.total_step, dtype=np.float64)
    warmup = cfg.end_lr + (cfg.lr_init - cfg.end_lr) * steps / max(cfg.warmup_step, 1)
    progress = (steps - cfg.warmup_step) / max(cfg.total_step - cfg.warmup_step, 1)
    remaining = 1 - np.clip(progress, 0, 1)
    if cfg.schedule == "linear":
        decay = cfg.end_lr + (cfg.lr_init - cfg.end_lr) * remaining
    else:
        decay = np.maximum(cfg.lr_init * remaining**cfg.power, cfg.end_lr)
    rate = np.where(steps < cfg.warmup_step, warmup, decay)
    if cfg.lr_scale == "none" or cfg.base_batch_size is None:
        return rate
    return rate * (global_batch(cfg, ranks) / cfg.base_batch_size)


def global_batch(cfg: Config, ranks: int) -> int:
    """Return the number of crops in one optimizer step: over all micro-batches and all ranks."""
    return cfg.batch_size * cfg.accumulate_steps * ranks
