"""The MindSpore network and loss give the authors' values (tests/data/official_w6), op by op and compiled."""

import functools
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.engines.mindspore.engine import Logits
from ocrnet.engines.mindspore.hrnet import resize
from ocrnet.engines.mindspore.loss import SegmentationLoss, label_weight, weight_table
from ocrnet.engines.mindspore.ocr import OCRNet
from ocrnet.weights.mindspore import canonical_name

DATA = Path(__file__).parents[1] / "data" / "official_w6"
# fmt: off
CITYSCAPES = (0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
              0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507)
# fmt: on
ZERO_GRADIENT = {"conv3x3_ocr.0.bias", "aux_head.0.bias"}
cases = pytest.mark.parametrize("case", ["a", "b"])


@pytest.fixture(autouse=True)
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


@functools.cache
def read(name):
    return {
        key: array.numpy()
        for key, array in torch.load(DATA / f"{name}.pth", weights_only=True).items()
        if isinstance(array, torch.Tensor)
    }


@functools.cache
def nested(name, key):
    return {k: v.numpy() for k, v in torch.load(DATA / f"{name}.pth", weights_only=True)[key].items()}


@functools.cache
def summary(case):
    return json.loads((DATA / "summary.json").read_text())[f"case_{case}"]


def network(**arch):
    """Return our network with the authors' weights, and its parameters by canonical name."""
    model = OCRNet(Arch(width=6, channels=48, key_channels=24, **arch))
    named = {canonical_name(p.name): p for p in model.get_parameters()}
    assert list(named) == [*architecture.shapes(Arch(width=6, channels=48, key_channels=24))]
    for name, parameter in named.items():
        parameter.set_data(Tensor(read("state_dict")[name]))
    return model, named


def outputs(case, **arch):
    model, _ = network(**arch)
    return [head.asnumpy() for head in Logits(model).set_train(False)(Tensor(read(f"case_{case}")["x"]))]


def largest_difference(actual, expected):
    return np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()


@cases
@pytest.mark.parametrize("align_corners", [True, False])
def test_eval_outputs_equal_the_authors(case, align_corners):
    actual = outputs(case, align_corners=align_corners)
    suffix = "" if align_corners else "_align_corners_false"
    sample, exact = read(f"case_{case}"), summary(case)["eval" + suffix]
    for name, logits in zip(("aux", "ocr"), actual, strict=True):
        assert largest_difference(logits, sample[name + suffix]) < 1e-5
        position = tuple(np.array(exact["positions_chw"]).T)
        assert largest_difference(logits[0][position], np.array(exact[f"{name}_at_fp64"])) < 1e-5


@pytest.mark.long
def test_one_compiled_graph_serves_any_size():
    """Both cases run in one graph with dynamic shapes."""
    ms.set_context(mode=ms.GRAPH_MODE)
    cell = Logits(network()[0]).set_train(False)
    cell.set_inputs(Tensor(shape=[None, 3, None, None], dtype=ms.float32))
    for case in "ab":
        sample = read(f"case_{case}")
        aux, ocr = cell(Tensor(sample["x"]))
        assert largest_difference(aux.asnumpy(), sample["aux"]) < 1e-5
        assert largest_difference(ocr.asnumpy(), sample["ocr"]) < 1e-5
        full = resize(ocr, sample["label"].shape[1:], True).asnumpy()
        np.testing.assert_array_equal(full.argmax(1), sample["pred_full_res"])


@pytest.mark.parametrize(
    "change",
    [{"align_corners": False}, {"fuse_resize": "nearest"}, {"same_padding": True}, {"head_eps": 1e-4}],
    ids=str,
)
def test_another_layer_rule_changes_the_outputs(change, monkeypatch):
    monkeypatch.setitem(architecture.VARIANTS, "changed", architecture.Variant(**change))
    sample = read("case_a")
    aux, ocr = outputs("a", variant="changed")
    assert (
        max(largest_difference(aux, sample["aux"]), largest_difference(ocr, sample["ocr"])) > 1e-4
    )  # ten times the bound


class WithLoss(nn.Cell):
    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def construct(self, x, label, denominator):
        aux, ocr = self.network(x, None)
        return self.loss(aux, ocr, label, denominator)


@functools.cache
def train(case, aux=0.4):
    """Return the loss, gradients and statistics of one training pass with the authors' weights."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    sample = read(f"case_{case}")
    model, named = network()
    cell = WithLoss(model, SegmentationLoss(CITYSCAPES, True, aux=aux)).set_train(True)
    weights = {name: p for name, p in named.items() if not architecture.is_buffer(name)}
    denominator = Tensor(np.array([label_weight(sample["label"], weight_table(CITYSCAPES))], np.float32))
    compute = ms.value_and_grad(cell, None, list(weights.values()), has_aux=True)
    (total, _), gradients = compute(Tensor(sample["x"]), Tensor(sample["label"]), denominator)
    statistics = {name: p.asnumpy().copy() for name, p in named.items() if architecture.is_buffer(name)}
    return float(total.asnumpy()), dict(zip(weights, [g.asnumpy() for g in gradients], strict=True)), statistics


@cases
def test_the_loss_equals_the_authors(case):
    assert train(case)[0] == pytest.approx(summary(case)["train_loss_fp32"], rel=1e-5)


@cases
def test_the_running_statistics_equal_the_authors(case):
    actual = train(case)[2]
    for name, expected in nested(f"case_{case}", "running_after_train").items():
        assert largest_difference(actual[name], expected) < 1e-5
        assert largest_difference(actual[name], read("state_dict")[name]) > 1e-4  # fails if the update is missing


def norm_differences(case, **loss):
    """Return relative differences of gradient norms from the authors' float64 norms, without the two zero gradients."""
    actual, expected = train(case, **loss)[1], summary(case)["grad_norm_fp64"]
    assert actual.keys() == expected.keys()
    names = [name for name in expected if name not in ZERO_GRADIENT]
    return np.array([abs(np.linalg.norm(actual[name].astype(np.float64)) / expected[name] - 1) for name in names])


@cases
def test_the_gradients_equal_the_authors(case):
    differences = norm_differences(case)
    assert np.median(differences) < 2e-3
    assert differences.max() < 5e-2
    actual = train(case)[1]
    assert all(np.abs(actual[name]).max() < 1e-6 for name in ZERO_GRADIENT)
    for name, expected in nested(f"case_{case}", "grads").items():
        if name not in ZERO_GRADIENT:
            assert np.linalg.norm(actual[name] - expected) < 5e-2 * np.linalg.norm(expected)


def test_another_loss_weight_exceeds_the_bounds():
    assert train("a", aux=0.5)[0] != pytest.approx(summary("a")["train_loss_fp32"], rel=1e-3)
    differences = norm_differences("a", aux=0.5)
    assert np.median(differences) > 2e-3
    assert differences.max() > 5e-2


@cases
def test_ohem_equals_the_authors(case):
    sample, exact = read(f"case_{case}"), summary(case)["eval"]["ohem_thres0.9_keep1000_fp64"]

    def value(**ohem):
        loss = SegmentationLoss(CITYSCAPES, True, **ohem)
        return float(loss(Tensor(sample["aux"]), Tensor(sample["ocr"]), Tensor(sample["label"]), None)[0].asnumpy())

    assert value(ohem=(0.9, 1000)) == pytest.approx(exact, rel=1e-5)
    assert value(ohem=(0.1, 1)) != pytest.approx(exact, rel=1e-5)
