"""Boundaries, calibration and the tally against what is slow and plain: every pixel against every other."""

import math

import numpy as np
import pytest

from ocrnet.evaluation import metrics
from ocrnet.report.figures import BINS, Calibration, Tally, boundary, boundary_scores, ranked, spread, tolerance


def blobs(rng: np.random.Generator, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return class indices uint8 H,W in patches, so that there are boundaries and not noise alone."""
    small = rng.integers(0, num_classes, (-(-size[0] // 7), -(-size[1] // 7))).astype(np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((7, 7), np.uint8))[: size[0], : size[1]])


def slow_boundary(indices: np.ndarray, truth: np.ndarray, index: int) -> list[tuple[int, int]]:
    height, width = indices.shape
    found = []
    for y in range(height):
        for x in range(width):
            near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            if indices[y, x] == index and truth[y, x] != 255 and any(
                0 <= b < height and 0 <= a < width and truth[b, a] != 255 and indices[b, a] != index for b, a in near
            ):  # fmt: skip
                found.append((y, x))
    return found


def slow_scores(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> list[float]:
    reach = math.ceil(0.0075 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))

    def share(points, others) -> float:
        near = [any((y - b) ** 2 + (x - a) ** 2 <= reach**2 for b, a in others) for y, x in points]
        return sum(near) / len(near) if near else 0.0

    scores = []
    for index in range(num_classes):
        here, there = slow_boundary(prediction, truth, index), slow_boundary(truth, truth, index)
        precision, recall = share(here, there), share(there, here)
        both = precision + recall
        scores.append(2 * precision * recall / both if both else 0.0 if here or there else math.nan)
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_boundary_scores_equal_a_brute_force_comparison(seed):
    rng = np.random.default_rng(seed)
    size = ((33, 47), (90, 160), (64, 64))[seed % 3]  # 160x90 has a tolerance of 2 pixels
    truth = blobs(rng, size, 4)
    prediction = np.roll(truth, (seed % 4, 1), (0, 1))
    prediction[: size[0] // 3, : size[1] // 4] = 1
    truth[rng.random(size) < 0.05] = 255
    truth[-9:, -9:] = 255
    if seed == 3:
        truth[truth == 2] = 3  # a class in the prediction alone
    np.testing.assert_allclose(boundary_scores(prediction, truth, 6), slow_scores(prediction, truth, 6), rtol=1e-12)


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
    truth = np.repeat(np.arange(0, 200, 5), 4)[None].repeat(9, axis=0).astype(np.uint8)
    prediction = truth.copy()
    prediction[prediction == 40] = 40 + 32  # the same bit of another number
    np.testing.assert_allclose(boundary_scores(prediction, truth, 200), slow_scores(prediction, truth, 200))


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
    truth = np.zeros((60, 60), np.uint8)  # a tolerance of 1 pixel
    truth[:, 30:] = 1
    assert boundary_scores(truth, truth, 2).tolist() == [1.0, 1.0]
    assert boundary_scores(np.roll(truth, 1, 1)[:, 5:55], truth[:, 5:55], 2).tolist() == [1.0, 1.0]
    assert boundary_scores(np.roll(truth, 4, 1)[:, 5:55], truth[:, 5:55], 2).tolist() == [0.0, 0.0]


def slow_error(confidence: list[float], right: list[bool]) -> float:
    error = 0.0
    for number in range(15):
        inside = [
            i for i, sure in enumerate(confidence)
            if number / 15 < sure <= (number + 1) / 15 or (number == 0 and sure == 0)
        ]  # fmt: skip
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return error


def test_the_calibration_error_matches_guo_over_the_valid_pixels_of_all_images():
    rng = np.random.default_rng(7)
    found, sure, right = Calibration(), [], []
    for _ in range(3):
        confidence = rng.random((20, 30)).astype(np.float32)
        confidence[0, :3] = (1.0, 0.0, 0.5)
        prediction = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        truth = np.where(rng.random((20, 30)) < confidence, prediction, (prediction + 1) % 3).astype(np.uint8)
        truth[rng.random((20, 30)) < 0.2] = 255
        found.add(confidence, prediction, truth)
        sure += confidence[truth != 255].tolist()
        right += (prediction == truth)[truth != 255].tolist()
    assert found.pixels.sum() == len(sure)
    assert found.error == pytest.approx(slow_error(sure, right), rel=1e-6)


def test_calibration_counts_confidence_1_in_the_last_interval():
    found = Calibration()
    found.add(np.ones((4, 5), np.float32), np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8))
    assert (found.pixels[BINS - 1], found.error) == (20, 0.0)
    found.add(np.ones((4, 5), np.float32), np.ones((4, 5), np.uint8), np.zeros((4, 5), np.uint8))
    assert found.error == 0.5
    assert math.isnan(Calibration().error)


def test_the_calibration_error_does_not_depend_on_the_order_of_images():
    rng = np.random.default_rng(1)
    images = [(rng.random((9, 9)).astype(np.float32), blobs(rng, (9, 9), 3), blobs(rng, (9, 9), 3)) for _ in range(5)]
    forth, back = Calibration(), Calibration()
    for one in images:
        forth.add(*one)
    for one in reversed(images):
        back.add(*one)
    assert forth.error == back.error


def test_a_tally_sums_the_confusion_and_averages_the_boundary_scores():
    rng = np.random.default_rng(3)
    tally, total, edges = Tally(3), np.zeros((3, 3), np.int64), []
    for number in range(4):
        prediction, truth = blobs(rng, (40, 40), 2 + number % 2), blobs(rng, (40, 40), 2 + number % 2)
        tally.add(f"image {number}", prediction, np.ones((40, 40), np.float32), truth)
        total += metrics.confusion(prediction, truth, 3)
        edges.append(slow_scores(prediction, truth, 3))
    np.testing.assert_array_equal(tally.confusion, total)
    np.testing.assert_allclose(tally.boundary, np.nanmean(edges, axis=0))
    names = [tally.images[i]["name"] for i in ranked(tally.images)]
    scores = [image["mean_iou"] for image in tally.images]
    assert names == [f"image {i}" for i in np.argsort(scores)]
    tally.add("nothing labeled", truth, np.ones((40, 40), np.float32), np.full((40, 40), 255, np.uint8))
    assert tally.images[-1]["mean_iou"] is None
    assert len(ranked(tally.images)) == 4
