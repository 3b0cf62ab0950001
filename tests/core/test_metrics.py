import json
import math

import numpy as np
import pytest

from ocrnet.evaluation import metrics
from ocrnet.utils.errors import OcrnetError


def random_maps(rng, shape=(40, 60), num_classes=5, ignored=0.2):
    truth = rng.integers(0, num_classes, shape, dtype=np.uint8)
    truth[rng.random(shape) < ignored] = 255
    return rng.integers(0, num_classes, shape, dtype=np.uint8), truth


def score(prediction, truth, num_classes):
    counts = metrics.confusion(prediction, truth, num_classes)
    return metrics.scores(counts, [f"c{index}" for index in range(num_classes)])


def test_small_case_calculated_by_hand():
    truth = np.array([[0, 0, 0, 1], [1, 255, 255, 3]], np.uint8)
    prediction = np.array([[0, 0, 1, 1], [1, 0, 2, 0]], np.uint8)
    counts = metrics.confusion(prediction, truth, 5)
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


def test_a_class_only_predicted_counts_in_mean_iou_but_not_in_mean_accuracy():
    scores = score(np.array([0, 1], np.uint8), np.array([0, 0], np.uint8), 3)
    np.testing.assert_allclose(scores.iou, [0.5, 0, math.nan])
    assert scores.mean_iou == 0.25
    assert scores.mean_accuracy == 0.5


@pytest.mark.parametrize("num_classes", [1, 2, 19, 255])
def test_counts_equal_a_plain_loop(num_classes):
    prediction, truth = random_maps(np.random.default_rng(num_classes), (9, 31), num_classes)
    expected = np.zeros((num_classes, num_classes), np.int64)
    for row, column in zip(truth.flat, prediction.flat, strict=True):
        if row != 255:
            expected[row, column] += 1
    np.testing.assert_array_equal(metrics.confusion(prediction, truth, num_classes), expected)


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_parts_add_up_to_the_whole_and_do_not_depend_on_order(seed):
    rng = np.random.default_rng(seed)
    prediction, truth = random_maps(rng, (6, 20, 30))
    whole = metrics.confusion(prediction, truth, 5)
    assert whole.sum() == np.count_nonzero(truth != 255)
    parts = [metrics.confusion(p, t, 5) for p, t in zip(prediction, truth, strict=True)]
    np.testing.assert_array_equal(sum(parts), whole)
    order = rng.permutation(truth.size)
    shuffled = metrics.confusion(prediction.reshape(-1)[order], truth.reshape(-1)[order], 5)
    np.testing.assert_array_equal(shuffled, whole)
    np.testing.assert_array_equal(
        metrics.confusion(prediction[:, ::2, ::-3], truth[:, ::2, ::-3], 5).sum(), (truth[:, ::2, ::-3] != 255).sum()
    )


def test_predictions_where_the_truth_is_ignored_do_not_matter():
    prediction, truth = random_maps(np.random.default_rng(0))
    altered = np.where(truth == 255, 200, prediction).astype(np.uint8)
    np.testing.assert_array_equal(metrics.confusion(altered, truth, 5), metrics.confusion(prediction, truth, 5))


def test_a_perfect_prediction_scores_one():
    _, truth = random_maps(np.random.default_rng(1))
    scores = score(np.where(truth == 255, 0, truth).astype(np.uint8), truth, 5)
    assert (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy) == (1, 1, 1)
    assert scores.frequency_weighted_iou == pytest.approx(1)


def test_all_pixels_ignored_gives_nan():
    truth = np.full((4, 4), 255, np.uint8)
    scores = score(np.zeros((4, 4), np.uint8), truth, 3)
    means = (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy, scores.frequency_weighted_iou)
    assert all(math.isnan(value) for value in (*means, *scores.iou, *scores.accuracy, *scores.share))
    assert scores.pixels == 0
    answer, mean_iou = metrics.constant_prediction(metrics.scores(np.zeros((3, 3), np.int64), ["a", "b", "c"]))
    assert answer == 0
    assert math.isnan(mean_iou)


def test_what_does_not_fit_is_refused():
    good = np.zeros((2, 3), np.uint8)
    with pytest.raises(OcrnetError, match=r"truth has class index 5, 7; allowed are 0 to 4 and 255"):
        metrics.confusion(np.zeros(3, np.uint8), np.array([5, 7, 255], np.uint8), 5)
    with pytest.raises(OcrnetError, match="truth has class index 254"):
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
def test_constant_answer_is_the_score_of_that_answer(seed):
    rng = np.random.default_rng(seed)
    prediction, truth = random_maps(rng, num_classes=6)
    truth[truth == seed] = 255  # one class is absent
    answer, mean_iou = metrics.constant_prediction(score(prediction, truth, 6))
    assert np.count_nonzero(truth == answer) == max(np.count_nonzero(truth == index) for index in range(6))
    assert mean_iou == pytest.approx(score(np.full_like(truth, answer), truth, 6).mean_iou, abs=1e-12)


def test_table_and_dict_show_the_numbers():
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
