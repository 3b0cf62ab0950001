"""The contract of every engine for prediction: passes are averaged, mirrored and cut into windows as documented."""

import dataclasses

import numpy as np
import pytest
from tiny import ARCH, MemoryStream

from ocrnet import architecture
from ocrnet.config import Eval
from ocrnet.engines.tta import Pass, make_passes
from ocrnet.utils.errors import OcrnetError

ALL = ("labels", "confidence", "probabilities")
SIZE = (75, 101)


@pytest.fixture(scope="module")
def trained():
    """Return a dict of states by engine. Each engine trains once to fill it, so that BN statistics have no defaults."""
    return {}


@pytest.fixture
def engine(make_engine, trained, request):
    engine = make_engine(MemoryStream())
    name = request.node.callspec.params["make_engine"]
    if name not in trained:
        engine.train(2)
        trained[name] = engine.state()
    engine.restore(trained[name], 2)
    return engine


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (2, *SIZE, 3), np.uint8)


def predict(engine, images, **eval_options):
    return engine.predict(images, make_passes(Eval(**eval_options), SIZE), ALL)


def test_outputs_have_the_documented_shapes_and_dtypes(engine, images):
    found = predict(engine, images)
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "labels": ((2, *SIZE), "uint8"),
        "confidence": ((2, *SIZE), "float32"),
        "probabilities": ((2, 5, *SIZE), "float32"),
    }
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found["labels"], found["probabilities"].argmax(axis=1))
    np.testing.assert_array_equal(found["confidence"], found["probabilities"].max(axis=1))
    np.testing.assert_array_equal(engine.predict(images, make_passes(Eval(), SIZE))["labels"], found["labels"])
    with pytest.raises(OcrnetError, match="lables"):
        engine.predict(images, make_passes(Eval(), SIZE), ("lables",))


def test_labels_do_not_depend_on_the_other_requested_outputs(make_engine, images):
    engine = make_engine(fresh=False)
    tied = {
        "cls_head.weight": np.zeros((5, 16, 1, 1), np.float32),
        "cls_head.bias": np.float32([0, 1e-9, -50, -50, -50]),
    }
    engine.restore(architecture.init(ARCH, 1) | tied, 0)  # the softmax rounds both to a half, the logits differ
    whole = make_passes(Eval(), SIZE)
    np.testing.assert_array_equal(engine.predict(images, whole)["labels"], 1)
    np.testing.assert_array_equal(engine.predict(images, whole, ALL)["labels"], 1)


def test_regions_and_relation_are_softmaxes_of_the_head(make_engine, engine, images):
    whole = make_passes(Eval(scales=(0.5,)), SIZE)
    found = engine.predict(images, whole, ("labels", "regions", "relation"))
    assert {found[name].shape for name in ("regions", "relation")} == {(2, 5, 10, 13)}
    assert {array.dtype.name for array in found.values()} == {"uint8", "float32"}
    np.testing.assert_allclose(found["regions"].sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(found["relation"].sum(axis=1), 1, rtol=1e-5)
    mean = np.array(engine.cfg.data.mean, np.float32), np.array(engine.cfg.data.std, np.float32)
    x = ((images / np.float32(255) - mean[0]) / mean[1]).transpose(0, 3, 1, 2)
    once = engine.predict(images, make_passes(Eval(), SIZE), ("regions",))["regions"]
    aux = np.exp(engine.logits(x)[0])
    np.testing.assert_allclose(once, aux / aux.sum(axis=(2, 3), keepdims=True), rtol=1e-3)
    other = make_engine(fresh=False)
    for factor in (0, 1000):  # all regions are equal, or very different
        scaled = ("aux_head.3.weight", "ocr_distri_head.object_context_block.f_object.0.weight")
        other.restore({name: factor * w if name in scaled else w for name, w in engine.state().items()}, 0)
        relation = other.predict(images, whole, ("relation",))["relation"]
        assert (np.abs(relation - 1 / 5).max() > 1e-2) == bool(factor)
    for options in ({"scales": (1.0, 0.5)}, {"flip": True}, {"slide": (64, 64)}):
        with pytest.raises(OcrnetError, match=r"relation: requires a single pass over whole images"):
            engine.predict(images, make_passes(Eval(**options), SIZE), ("relation",))


def test_predictions_use_the_current_weights(make_engine, engine, images):
    predict(engine, images)
    engine.train(2)
    trained = predict(engine, images)["probabilities"]
    other = make_engine(fresh=False)
    other.restore(engine.state(), 0)
    np.testing.assert_array_equal(predict(other, images)["probabilities"], trained)
    other.restore(architecture.init(ARCH, 1), 0)
    fresh = predict(make_engine(), images)["probabilities"]
    np.testing.assert_array_equal(predict(other, images)["probabilities"], fresh)
    assert np.abs(fresh - trained).max() > 1e-3


def test_a_batch_gives_the_same_probabilities_as_single_images(engine, images):
    both, one = predict(engine, images), predict(engine, images[1:])
    np.testing.assert_allclose(both["probabilities"][1:], one["probabilities"], atol=1e-5)


@pytest.mark.compiled(long=True)
def test_passes_are_averaged_after_the_softmax(engine, images):
    separate = [predict(engine, images, scales=(scale,))["probabilities"] for scale in (0.5, 1.0, 1.75)]
    together = predict(engine, images, scales=(0.5, 1.0, 1.75))["probabilities"]
    np.testing.assert_allclose(together, np.mean(separate, axis=0), atol=1e-6)
    assert np.abs(together - separate[1]).max() > 1e-3


def test_a_mirrored_pass_equals_the_pass_on_the_mirrored_image(engine, images):
    whole = ((0, 0, *SIZE),)
    mirrored = engine.predict(images, [Pass(SIZE, True, whole)], ALL)["probabilities"]
    mirrored_images = np.ascontiguousarray(images[:, :, ::-1])
    reference = engine.predict(mirrored_images, [Pass(SIZE, False, whole)], ALL)["probabilities"]
    np.testing.assert_allclose(mirrored, reference[..., ::-1], atol=1e-5)


def test_one_window_that_covers_the_image_equals_the_whole_image(engine, images):
    np.testing.assert_array_equal(
        predict(engine, images, slide=(200, 200))["probabilities"], predict(engine, images)["probabilities"]
    )


def test_pixels_of_only_one_window_have_the_probabilities_of_that_window(engine, images):
    found = predict(engine, images, slide=(64, 64))
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, rtol=1e-5)
    left = engine.predict(images[:, :64, :64], [Pass((64, 64), False, ((0, 0, 64, 64),))], ALL)["probabilities"]
    corner = slice(0, 11), slice(0, 21)  # covered only by the first window: the next ones begin at row 11 and column 37
    np.testing.assert_allclose(found["probabilities"][(..., *corner)], left[(..., *corner)], atol=1e-5)


def test_logits_have_a_quarter_of_the_size_rounded_up(engine):
    x = np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)
    for head in engine.logits(x):
        assert (head.shape, head.dtype) == ((2, 5, 19, 26), np.float32)


def test_the_align_corners_rule_of_the_architecture_is_used(make_engine, images):
    other = dataclasses.replace(ARCH, align_corners=False)
    a, b = predict(make_engine(), images), predict(make_engine(arch=other), images)
    assert np.abs(a["probabilities"] - b["probabilities"]).max() > 1e-4


def test_the_sum_over_a_single_rank_is_the_array(engine):
    array = np.array([[2**53 + 1]], np.int64)
    np.testing.assert_array_equal(engine.sum(array), array)
