"""`ocrnet check`: each problem is reported with its file, and the pixels of valid files are counted."""

import numpy as np
import pytest

from ocrnet.data import statistics
from ocrnet.data.datasets import open_dataset
from ocrnet.data.image_io import write_png


@pytest.fixture
def own(tmp_path):
    """Return a folder dataset of four valid pairs of 20x30: half road and half sky, and one pair ignored entirely."""
    (tmp_path / "classes.yml").write_text("[road, sky, boat]")
    for i in range(4):
        label = np.full((20, 30), 1, np.uint8)
        label[:10] = 0
        write_png(tmp_path / f"images/train/{i}.png", np.zeros((20, 30, 3), np.uint8))
        write_png(tmp_path / f"labels/train/{i}.png", label if i else np.full_like(label, 255))
    return tmp_path


def inspect(root, workers=2):
    dataset = open_dataset("folder", root, "train")
    return statistics.inspect(dataset, range(len(dataset)), workers=workers), dataset


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_valid_files_are_counted(own, workers):
    report, dataset = inspect(own, workers)
    assert report.problems == []
    assert report.read == 4
    assert report.pixels.tolist() == [900, 900, 0]
    assert report.images.tolist() == [3, 3, 0]
    assert report.ignored == 600
    assert report.sizes == {(20, 30): 4}
    assert report.unlabeled == ["0"]
    text = statistics.text(report, dataset.classes)
    assert "warning: no pixels of boat" in text
    assert "warning: 0 has no labeled pixels" in text
    assert "\nignored: 25.00 % of all pixels" in text


def test_problems_are_reported_and_the_other_files_are_counted(own):
    image = own / "images/train/1.png"
    image.write_bytes(image.read_bytes()[:40])
    write_png(own / "labels/train/2.png", np.zeros((20, 31), np.uint8))
    write_png(own / "labels/train/3.png", np.full((20, 30), 7, np.uint8))
    report, dataset = inspect(own)
    assert report.read == 1
    first_lines = [problem.splitlines()[0] for problem in report.problems]
    assert len(first_lines) == 3
    assert "1.png is truncated" in first_lines[0]
    assert "the sizes must match" in first_lines[1]
    assert "holds the unknown id 7" in first_lines[2]
    assert statistics.text(report, dataset.classes).count("problem: ") == 3


def test_masks_of_0_and_255_get_a_hint_that_255_is_ignored(own):
    for name in range(4):
        write_png(own / f"labels/train/{name}.png", np.where(np.eye(20, 30) > 0, 0, 255).astype(np.uint8))
    report, dataset = inspect(own)
    assert "a mask of 0 and 255 needs 1 instead of 255" in statistics.text(report, dataset.classes)
    for name in range(4):
        write_png(own / f"labels/train/{name}.png", np.full((20, 30), 255, np.uint8))
    report, _ = inspect(own)
    assert report.problems == ["no pixel of the 4 images is labeled; all pixels are ignored"]


def test_class_weights_follow_the_formula():
    report = statistics.Report(np.array([9000, 1000]), np.array([1, 1]))
    raw = 1 / np.log(1.02 + np.array([0.9, 0.1]))
    np.testing.assert_allclose(report.class_weights, raw / (0.9 * raw[0] + 0.1 * raw[1]))
    assert (report.class_weights * report.shares).sum() == pytest.approx(1)
