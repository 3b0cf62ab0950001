"""Code that the benchmarks share."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ocrnet.data.sampler import Sample


class Noise:
    """A training stream that always returns one sample of noise, so that no loader time is measured."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        self.sample = Sample(image, rng.integers(0, 19, size).astype(np.uint8), np.ones(channels, bool))

    def __getitem__(self, number: int) -> Sample:
        """Return the sample."""
        return self.sample


def write_report(report: Mapping[str, object], out: str | None) -> None:
    """Print a report as JSON, and write it to the file ``out`` if it is not None."""
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
