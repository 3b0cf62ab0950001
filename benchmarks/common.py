"""What the benchmarks share."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ocrnet.data.sampler import Sample


class Noise:
    """A training stream of one sample of noise, made once: the loader is not what is measured."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        self.sample = Sample(image, rng.integers(0, 19, size).astype(np.uint8), np.ones(channels, bool))

    def __getitem__(self, number: int) -> Sample:
        """Return the one sample."""
        return self.sample


def tell(report: Mapping[str, object], out: str | None) -> None:
    """Print a report as JSON, and keep it in the file ``out`` where one is given."""
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
