"""Boundary scores, calibration and tally, compared with slow and simple implementations over all pairs of pixels."""

import math

import numpy as np
import pytest

from ocrnet.evaluation import metrics
from ocrnet.report.figures import BINS, Calibration, Tally, boundary, boundary_scores, ranked, spread, tolerance


def blobs(rng: np.random.Generator, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return class indices uint8 H,W in patches, so that there are boundaries and not only noise."""
    small = rng.integers(0, num_classes, (-(-size[0] // 7), -(-size[1] // 7))).astype(np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((7, 7), np.uint8))[: size[0], : size[1]])


def slow_boundary(indices: np.ndarray, label: np.ndarray, index: int) -> list[tuple[int, int]]:
    height, width = indices.shape
    pixels = []
    for y in range(height):
        for x in range(width):
            near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            if indices[y, x] == index and label[y, x] != 255 and any(
                0 <= b < height and 0 <= a < width and label[b, a] != 255 and indices[b, a] != index for b, a in near
            ):  # fmt: skip
                pixels.append((y, x))
    return pixels


def slow_scores(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> list[float]:
    reach = math.ceil(0.0075 * math.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2))

    def share(points, others) -> float:
        near = [any((y - b) ** 2 + (x - a) ** 2 <= reach**2 for b, a in others) for y, x in points]
        return sum(near) / len(near) if near else 0.0

    scores = []
    for index in range(num_classes):
        here, there = slow_boundary(prediction, label, index), slow_boundary(label, label, index)
        precision, recall = share(here, there), share(there, here)
        both = precision + recall
        scores.append(2 * precision * recall / both if both else 0.0 if here or there else math.nan)
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_boundary_scores_equal_a_brute_force_comparison(seed):
    rng = np.random.default_rng(seed)
    size = ((33, 47), (90, 160), (64, 64))[seed % 3]  # 160x90 has a tolerance of 2 pixels
    label = blobs(rng, size, 4)
    prediction = np.roll(label, (seed % 4, 1), (0, 1))
    prediction[: size[0] // 3, : size[1] // 4] = 1
    label[rng.random(size) < 0.05] = 255
    label[-9:, -9:] = 255
    if seed == 3:
        label[label == 2] = 3  # a class that is only in the prediction
    np.testing.assert_allclose(boundary_scores(prediction, label, 6), slow_scores(prediction, label, 6), rtol=1e-12)


@pytest.mark.parametrize("reach", [1, 2, 3, 5, 9, 18])
def test_bits_spread_over_a_disk_of_the_given_radius(reach):
    bits = np.where(np.random.default_rng(reach).random((23, 40)) < 0.03, 5, 0).astype(np.uint32)
    bits[3, 7] = 1 << 31
    slow = np.zeros_like(bits)
    for y, x in np.argwhere(bits):
        rows, columns = np.ogrid[: bits.shape[0], : bits.shape[1]]
        slow[(rows - y) ** 2 + (columns - x) ** 2 <= reach**2] |= bits[y, x]
    np.testing.assert_array_equal(spread(bits, reach), slow)


def test_more_classes_than_bits_are_matched_correctly():
    label = np.repeat(np.arange(0, 200, 5), 4)[None].repeat(9, axis=0).astype(np.uint8)
    prediction = label.copy()
    prediction[prediction == 40] = 40 + 32  # another class that has the same bit
    np.testing.assert_allclose(boundary_scores(prediction, label, 200), slow_scores(prediction, label, 200))


def test_the_tolerance_is_0_75_percent_of_the_diagonal():
    assert tolerance(1024, 2048) == math.ceil(0.0075 * 2289.733608959) == 18
    assert tolerance(32, 32) == 1


def test_ignored_pixels_and_the_image_border_are_no_boundary():
    indices = np.zeros((6, 6), np.uint8)
    indices[:, 3:] = 1
    valid = np.ones((6, 6), bool)
    assert boundary(indices, valid).sum() == 12
    valid[:, 2] = False
    assert not boundary(indices, valid).any()
    assert np.isnan(boundary_scores(np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8), 2)).all()


def test_an_outline_within_the_tolerance_scores_1_and_others_0():
    label = np.zeros((60, 60), np.uint8)  # a tolerance of 1 pixel
    label[:, 30:] = 1
    assert boundary_scores(label, label, 2).tolist() == [1.0, 1.0]
    assert boundary_scores(np.roll(label, 1, 1)[:, 5:55], label[:, 5:55], 2).tolist() == [1.0, 1.0]
    assert boundary_scores(np.roll(label, 4, 1)[:, 5:55], label[:, 5:55], 2).tolist() == [0.0, 0.0]


def slow_error(confidence: list[float], correct: list[bool]) -> float:
    error = 0.0
    for number in range(15):
        inside = [
            i for i, value in enumerate(confidence)
            if number / 15 < value <= (number + 1) / 15 or (number == 0 and value == 0)
        ]  # fmt: skip
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return error


def test_the_calibration_error_matches_guo_over_the_valid_pixels_of_all_images():
    rng = np.random.default_rng(7)
    calibration, confidences, correct = Calibration(), [], []
    for _ in range(3):
        confidence = rng.random((20, 30)).astype(np.float32)
        confidence[0, :3] = (1.0, 0.0, 0.5)
        prediction = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        label = np.where(rng.random((20, 30)) < confidence, prediction, (prediction + 1) % 3).astype(np.uint8)
        label[rng.random((20, 30)) < 0.2] = 255
        calibration.add(confidence, prediction, label)
        confidences += confidence[label != 255].tolist()
        correct += (prediction == label)[label != 255].tolist()
    assert calibration.pixels.sum() == len(confidences)
    assert calibration.error == pytest.approx(slow_error(confidences, correct), rel=1e-6)


def test_calibration_counts_confidence_1_in_the_last_interval():
    calibration = Calibration()
    calibration.add(np.ones((4, 5), np.float32), np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8))
    assert (calibration.pixels[BINS - 1], calibration.error) == (20, 0.0)
    calibration.add(np.ones((4, 5), np.float32), np.ones((4, 5), np.uint8), np.zeros((4, 5), np.uint8))
    assert calibration.error == 0.5
    assert math.isnan(Calibration().error)


def test_the_calibration_error_does_not_depend_on_the_order_of_images():
    rng = np.random.default_rng(1)
    images = [(rng.random((9, 9)).astype(np.float32), blobs(rng, (9, 9), 3), blobs(rng, (9, 9), 3)) for _ in range(5)]
    forward, backward = Calibration(), Calibration()
    for one in images:
        forward.add(*one)
    for one in reversed(images):
        backward.add(*one)
    assert forward.error == backward.error


def test_a_tally_sums_the_confusion_and_averages_the_boundary_scores():
    rng = np.random.default_rng(3)
    tally, total, edges = Tally(3), np.zeros((3, 3), np.int64), []
    for number in range(4):
        prediction, label = blobs(rng, (40, 40), 2 + number % 2), blobs(rng, (40, 40), 2 + number % 2)
        tally.add(f"image {number}", prediction, np.ones((40, 40), np.float32), label)
        total += metrics.confusion(prediction, label, 3)
        edges.append(slow_scores(prediction, label, 3))
    np.testing.assert_array_equal(tally.confusion, total)
    np.testing.assert_allclose(tally.boundary, np.nanmean(edges, axis=0))
    names = [tally.images[i]["name"] for i in ranked(tally.images)]
    scores = [image["mean_iou"] for image in tally.images]
    assert names == [f"image {i}" for i in np.argsort(scores)]
    tally.add("nothing labeled", label, np.ones((40, 40), np.float32), np.full((40, 40), 255, np.uint8))
    assert tally.images[-1]["mean_iou"] is None
    assert len(ranked(tally.images)) == 4
