"""Learning-rate tables: one array for the whole run, computed once and indexed by step."""

import numpy as np

from ocrnet.config import Config


def table(cfg: Config, ranks: int = 1) -> np.ndarray:
    """Return the learning rate of every step on ``ranks`` ranks, float64 of shape (total_step,).

    Warmup rises linearly from ``end_lr`` to ``lr_init``, as in the MindSpore implementation. After warmup, ``linear``
    falls linearly to ``end_lr``; ``poly`` follows (1 - progress)^power, as in the HRNet-OCR authors' code, but not
    below ``end_lr``. With ``lr_scale: linear``, all rates are multiplied by the global batch size divided by
    ``base_batch_size`` (Goyal et al., 2017).
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
    """Return the number of crops in one step, over all ranks and micro-batches."""
    return cfg.batch_size * cfg.accumulate_steps * ranks
