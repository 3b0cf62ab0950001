"""Class table and scores equal those of cityscapesscripts, which needs NumPy 1 and so is not tested in tests/core."""

import copy

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as evaluation  # noqa: N813
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as official
from PIL import Image

from ocrnet.data.datasets import cityscapes
from ocrnet.evaluation import metrics


def test_the_class_table_equals_the_official_one():
    rows = [(x.name, x.id, x.trainId % 256, x.category, x.color) for x in official]
    assert [tuple(label) for label in cityscapes.LABELS] == rows
    table = cityscapes.classes()
    trained = sorted((x for x in official if 0 <= x.trainId < 255), key=lambda x: x.trainId)
    assert table.names == tuple(x.name for x in trained)
    assert table.categories == tuple(x.category for x in trained)
    assert table.palette == tuple(x.color for x in trained)
    label_ids = table.to_ids(np.array([[*range(19), 255]], np.uint8))
    np.testing.assert_array_equal(label_ids, [[*(x.id for x in trained), 0]])


@pytest.mark.parametrize("absent", [(), (16, 6, 7, 5), (10,)])
def test_scores_equal_the_official_cityscapes_evaluation(tmp_path, absent):
    rng = np.random.default_rng(7)
    train_ids = [label for label in sorted(official, key=lambda label: label.trainId) if 0 <= label.trainId < 255]
    to_label_id = np.array([label.id for label in train_ids], np.uint8)
    assert len(to_label_id) == 19
    to_train_id = np.full(256, 255, np.uint8)
    to_train_id[to_label_id] = range(19)

    files, total = [], np.zeros((19, 19), np.int64)
    present = np.setdiff1d(np.arange(19), absent).astype(np.uint8)
    # Label ids that are ignored in the evaluation are included.
    ground_truth_ids = np.setdiff1d(np.arange(34), to_label_id[list(absent)]).astype(np.uint8)
    for number in range(3):
        ground_truth = rng.choice(ground_truth_ids, (16, 24)).repeat(4, axis=0).repeat(4, axis=1)
        train_ids_of_pixels = to_train_id[ground_truth]
        is_random = (train_ids_of_pixels == 255) | (rng.random(ground_truth.shape) < 0.4)
        prediction = np.where(is_random, rng.choice(present, ground_truth.shape), train_ids_of_pixels)
        paths = tmp_path / f"pred_{number}.png", tmp_path / f"gt_{number}_labelIds.png"
        Image.fromarray(to_label_id[prediction]).save(paths[0])
        Image.fromarray(ground_truth).save(paths[1])
        files.append(tuple(map(str, paths)))
        total += metrics.confusion(prediction, train_ids_of_pixels, 19)

    args = copy.copy(evaluation.args)
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    expected = evaluation.evaluateImgLists([file for file, _ in files], [file for _, file in files], args)
    names, categories = [label.name for label in train_ids], [label.category for label in train_ids]
    ours = metrics.scores(total, names, categories)

    tolerance = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(ours.iou, [expected["classScores"][name] for name in names], **tolerance)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(ours.iou)), sorted(absent))
    np.testing.assert_allclose(ours.mean_iou, expected["averageScoreClasses"], **tolerance)
    assert 0.1 < ours.mean_iou < 0.9
    np.testing.assert_allclose(
        list(ours.category_iou.values()), [expected["categoryScores"][name] for name in ours.category_iou], **tolerance
    )
    np.testing.assert_allclose(ours.mean_category_iou, expected["averageScoreCategories"], **tolerance)
