"""Learning-rate tables: one array for the whole run, computed once, indexed by step."""

import numpy as np

from ocrnet.config import Config


def table(cfg: Config) -> np.ndarray:
    """Return the learning rate of every step, float64 of shape (total_step,).

    Warmup climbs linearly from ``end_lr`` to ``lr_init``, as the MindSpore relative does. After it, ``linear`` falls
    straight to ``end_lr``; ``poly`` follows (1 - progress)^power, as the authors of HRNet-OCR do, not below ``end_lr``.
    """
    steps = np.arange(cfg.total_step, dtype=np.float64)
    warming = cfg.end_lr + (cfg.lr_init - cfg.end_lr) * steps / max(cfg.warmup_step, 1)
    progress = (steps - cfg.warmup_step) / max(cfg.total_step - cfg.warmup_step, 1)
    left = 1 - np.clip(progress, 0, 1)
    if cfg.schedule == "linear":
        falling = cfg.end_lr + (cfg.lr_init - cfg.end_lr) * left
    else:
        falling = np.maximum(cfg.lr_init * left**cfg.power, cfg.end_lr)
    return np.where(steps < cfg.warmup_step, warming, falling)
