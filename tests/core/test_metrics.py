import json
import math

import numpy as np
import pytest

from ocrnet.evaluation import metrics
from ocrnet.utils.errors import OcrnetError


def random_maps(rng, shape=(40, 60), num_classes=5, ignored=0.2):
    label = rng.integers(0, num_classes, shape, dtype=np.uint8)
    label[rng.random(shape) < ignored] = 255
    return rng.integers(0, num_classes, shape, dtype=np.uint8), label


def score(prediction, label, num_classes):
    counts = metrics.confusion(prediction, label, num_classes)
    return metrics.scores(counts, [f"c{index}" for index in range(num_classes)])


def test_small_case_calculated_by_hand():
    label = np.array([[0, 0, 0, 1], [1, 255, 255, 3]], np.uint8)
    prediction = np.array([[0, 0, 1, 1], [1, 0, 2, 0]], np.uint8)
    counts = metrics.confusion(prediction, label, 5)
    assert counts.dtype == np.int64
    expected = np.zeros((5, 5), np.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[3, 0] = 2, 1, 2, 1
    np.testing.assert_array_equal(counts, expected)

    scores = metrics.scores(counts, ["a", "b", "c", "d", "e"], ["x", "x", "y", "y", "z"])
    np.testing.assert_allclose(scores.iou, [2 / 4, 2 / 3, math.nan, 0, math.nan])
    np.testing.assert_allclose(scores.accuracy, [2 / 3, 1, math.nan, 0, math.nan])
    np.testing.assert_allclose(scores.share, [3 / 6, 2 / 6, 0, 1 / 6, 0])
    assert scores.mean_iou == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores.pixel_accuracy == pytest.approx(4 / 6)
    assert scores.frequency_weighted_iou == pytest.approx(3 / 6 * 1 / 2 + 2 / 6 * 2 / 3)
    assert scores.category_iou == pytest.approx({"x": 5 / 6, "y": 0, "z": math.nan}, nan_ok=True)
    assert scores.mean_category_iou == pytest.approx(5 / 12)
    assert scores.pixels == 6


def test_a_class_that_is_only_predicted_counts_in_mean_iou_but_not_in_mean_accuracy():
    scores = score(np.array([0, 1], np.uint8), np.array([0, 0], np.uint8), 3)
    np.testing.assert_allclose(scores.iou, [0.5, 0, math.nan])
    assert scores.mean_iou == 0.25
    assert scores.mean_accuracy == 0.5


@pytest.mark.parametrize("num_classes", [1, 2, 19, 255])
def test_counts_equal_a_plain_loop(num_classes):
    prediction, label = random_maps(np.random.default_rng(num_classes), (9, 31), num_classes)
    expected = np.zeros((num_classes, num_classes), np.int64)
    for row, column in zip(label.flat, prediction.flat, strict=True):
        if row != 255:
            expected[row, column] += 1
    np.testing.assert_array_equal(metrics.confusion(prediction, label, num_classes), expected)


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_parts_add_up_to_the_whole_and_do_not_depend_on_order(seed):
    rng = np.random.default_rng(seed)
    prediction, label = random_maps(rng, (6, 20, 30))
    whole = metrics.confusion(prediction, label, 5)
    assert whole.sum() == np.count_nonzero(label != 255)
    parts = [metrics.confusion(p, t, 5) for p, t in zip(prediction, label, strict=True)]
    np.testing.assert_array_equal(sum(parts), whole)
    order = rng.permutation(label.size)
    shuffled = metrics.confusion(prediction.reshape(-1)[order], label.reshape(-1)[order], 5)
    np.testing.assert_array_equal(shuffled, whole)
    np.testing.assert_array_equal(
        metrics.confusion(prediction[:, ::2, ::-3], label[:, ::2, ::-3], 5).sum(), (label[:, ::2, ::-3] != 255).sum()
    )


def test_predictions_at_ignored_pixels_do_not_count():
    prediction, label = random_maps(np.random.default_rng(0))
    altered = np.where(label == 255, 200, prediction).astype(np.uint8)
    np.testing.assert_array_equal(metrics.confusion(altered, label, 5), metrics.confusion(prediction, label, 5))


def test_a_perfect_prediction_scores_one():
    _, label = random_maps(np.random.default_rng(1))
    scores = score(np.where(label == 255, 0, label).astype(np.uint8), label, 5)
    assert (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy) == (1, 1, 1)
    assert scores.frequency_weighted_iou == pytest.approx(1)


def test_all_pixels_ignored_gives_nan():
    label = np.full((4, 4), 255, np.uint8)
    scores = score(np.zeros((4, 4), np.uint8), label, 3)
    means = (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy, scores.frequency_weighted_iou)
    assert all(math.isnan(value) for value in (*means, *scores.iou, *scores.accuracy, *scores.share))
    assert scores.pixels == 0
    constant, mean_iou = metrics.constant_prediction(metrics.scores(np.zeros((3, 3), np.int64), ["a", "b", "c"]))
    assert constant == 0
    assert math.isnan(mean_iou)


def test_invalid_indices_shapes_and_dtypes_are_refused():
    good = np.zeros((2, 3), np.uint8)
    with pytest.raises(OcrnetError, match=r"ground truth has class index 5, 7; allowed are 0 to 4 and 255"):
        metrics.confusion(np.zeros(3, np.uint8), np.array([5, 7, 255], np.uint8), 5)
    with pytest.raises(OcrnetError, match="ground truth has class index 254"):
        metrics.confusion(np.zeros(1, np.uint8), np.array([254], np.uint8), 254)
    with pytest.raises(ValueError, match=r"prediction has class index 5; allowed are 0 to 4"):
        metrics.confusion(np.array([5], np.uint8), np.array([0], np.uint8), 5)
    with pytest.raises(ValueError, match="prediction has class index 255"):
        metrics.confusion(np.array([255], np.uint8), np.array([0], np.uint8), 255)
    with pytest.raises(ValueError, match=r"\(2, 3\), the ground truth \(3, 2\)"):
        metrics.confusion(good, good.T, 5)
    with pytest.raises(ValueError, match="int64"):
        metrics.confusion(good.astype(np.int64), good, 5)


@pytest.mark.parametrize("seed", range(5))
def test_the_constant_baseline_is_the_score_of_predicting_one_class(seed):
    rng = np.random.default_rng(seed)
    prediction, label = random_maps(rng, num_classes=6)
    label[label == seed] = 255  # one class is absent
    constant, mean_iou = metrics.constant_prediction(score(prediction, label, 6))
    assert np.count_nonzero(label == constant) == max(np.count_nonzero(label == index) for index in range(6))
    assert mean_iou == pytest.approx(score(np.full_like(label, constant), label, 6).mean_iou, abs=1e-12)


def test_table_and_dict_contain_the_scores():
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]], np.int64)
    scores = metrics.scores(counts, ["road", "traffic light", "sky"], ["flat", "object", "sky"])
    lines = metrics.table(scores).splitlines()
    assert lines[0].split() == ["class", "IoU", "%", "accuracy", "%", "pixels", "%"]
    assert [line.split() for line in lines[2:5]] == [
        ["road", "75.00", "75.00", "50.00"],
        ["traffic", "light", "80.00", "100.00", "50.00"],
        ["sky", "-", "-", "0.00"],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "mIoU                     77.50" in lines
    assert "category mIoU            77.50" in lines

    data = json.loads(json.dumps(metrics.as_dict(scores), allow_nan=False))
    assert data["mean_iou"] == pytest.approx(0.775)
    assert data["classes"]["sky"] == {"iou": None, "accuracy": None, "share": 0}
    assert data["categories"] == {"flat": 0.75, "object": 0.8, "sky": None}
    assert data["pixels"] == 8


def test_scores_without_categories_show_none():
    scores = metrics.scores(np.eye(2, dtype=np.int64), ["a", "b"])
    assert "category" not in metrics.table(scores)
    assert metrics.as_dict(scores)["categories"] == {}
    assert metrics.as_dict(scores)["mean_category_iou"] is None
