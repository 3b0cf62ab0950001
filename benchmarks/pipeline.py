"""The input pipeline alone, on one core: decoding 1024x2048 PNGs, augmenting, and both; prints one JSON document.

python benchmarks/pipeline.py [--dataset_dir FOLDER] [--out FILE]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from common import tell

from ocrnet import augment
from ocrnet.config import Data
from ocrnet.datasets import open_dataset, synthetic
from ocrnet.run import core_versions, git_commit
from ocrnet.stream import TrainStream


def images_per_second(call: Callable[[int], object], count: int, rounds: int) -> float:
    """Return the median over rounds of calls a second."""
    paces = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for number in range(count):
            call(number)
        paces.append(count / (time.perf_counter() - begun))
    return statistics.median(paces)


def measure(folder: str, crop_size: tuple[int, int], rounds: int) -> dict[str, object]:
    """Return images a second of each part on the training split of a Cityscapes tree."""
    cv2.setNumThreads(1)
    dataset = open_dataset("cityscapes", folder, "train")
    data = Data(dataset_dir=folder, crop_size=crop_size)
    stream = TrainStream(dataset, data, seed=1, channels=512, dropout=0.05)
    image, label = dataset.read(0)
    count = len(dataset)
    decoded = images_per_second(dataset.read, count, rounds)
    made = images_per_second(lambda n: augment.train(image, label, np.random.default_rng(n), data), 4 * count, rounds)
    both = images_per_second(stream.__getitem__, count, rounds)
    return {
        "image_size": list(label.shape),
        "crop_size": list(crop_size),
        "decode_images_per_second": decoded,
        "augment_images_per_second": made,
        "stream_images_per_second": both,
        "share_of_decoding": both / decoded,
        "augment_cost_in_decodes": decoded / made,
    }


def main() -> None:
    """Measure on a given Cityscapes tree, or on scenes made for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="a Cityscapes tree; without it scenes are made up")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop_size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        folder = args.dataset_dir or str(Path(made) / "scenes")
        if not args.dataset_dir:
            synthetic.write(folder, train=args.images, val=0, test=0, size=tuple(args.size))
        found = measure(folder, tuple(args.crop_size), args.rounds)
    report = {
        "data": "given" if args.dataset_dir else "synthetic scenes",
        **found,
        "load_before": load,
        "versions": core_versions(),
        "commit": git_commit(),
    }
    tell(report, args.out)


if __name__ == "__main__":
    main()
