"""The torch network gives the authors' values (tests/data/official_w6) and has the canonical names."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.engines.torch.hrnet import Norm, resize
from ocrnet.engines.torch.loss import SegmentationLoss, label_weight
from ocrnet.engines.torch.ocr import OCRNet

DATA = Path(__file__).parents[1] / "data" / "official_w6"
# fmt: off
CITYSCAPES = (0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
              0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507)
# fmt: on
ZERO_GRADIENT = {"conv3x3_ocr.0.bias", "aux_head.0.bias"}
cases = pytest.mark.parametrize("case", ["a", "b"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@functools.cache
def read(name):
    return torch.load(DATA / f"{name}.pth", weights_only=True)


@functools.cache
def summary(case):
    return json.loads((DATA / "summary.json").read_text())[f"case_{case}"]


def network(dtype=torch.float32, *, low_resolution=True, **arch):
    """Return our network with the authors' weights."""
    model = OCRNet(Arch(width=6, channels=48, key_channels=24, **arch), low_resolution=low_resolution)
    weights = {k: v for k, v in read("state_dict").items() if not k.endswith("num_batches_tracked")}
    model.load_state_dict(weights)
    return model.to(dtype)


@torch.no_grad()
def outputs(case, dtype=torch.float32, **arch):
    return network(dtype, **arch).eval()(read(f"case_{case}")["x"].to(dtype))


def largest_difference(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@cases
@dtypes
@pytest.mark.parametrize("align_corners", [True, False])
def test_eval_outputs_equal_the_authors(case, dtype, align_corners):
    actual = outputs(case, dtype, align_corners=align_corners)
    suffix = "" if align_corners else "_align_corners_false"
    sample, exact = read(f"case_{case}"), summary(case)["eval" + suffix]
    for name, logits in zip(("aux", "ocr"), actual, strict=True):
        assert largest_difference(logits, sample[name + suffix]) < 1e-5
        positions = torch.tensor(exact["positions_chw"]).T
        expected = torch.tensor(exact[f"{name}_at_fp64"], dtype=torch.float64)
        assert largest_difference(logits[0][tuple(positions)], expected) < (1e-5 if dtype == torch.float32 else 1e-10)


@cases
def test_the_full_size_prediction_equals_the_authors(case):
    sample = read(f"case_{case}")
    logits = resize(outputs(case)[1], tuple(sample["label"].shape[1:]), True)
    assert torch.equal(logits.argmax(1).to(torch.uint8), sample["pred_full_res"])


@cases
@dtypes
def test_training_outputs_and_statistics_equal_the_authors(case, dtype):
    sample, model = read(f"case_{case}"), network(dtype).train()
    with torch.no_grad():
        aux, ocr = model(sample["x"].to(dtype))
    # The stored values come from float64. Batch statistics amplify the float32 rounding, which differs between CPUs:
    # differences up to 1.7e-5 (aux) and 5.5e-5 (ocr, over the 19 regions) were measured.
    bound = 1e-4 if dtype == torch.float32 else 3e-7
    assert largest_difference(aux, sample["train_aux"]) < bound
    assert largest_difference(ocr, sample["train_ocr"]) < bound
    state, untouched = model.state_dict(), read("state_dict")
    for name, expected in sample["running_after_train"].items():
        assert largest_difference(state[name], expected) < 1e-5
        assert largest_difference(state[name], untouched[name]) > 1e-4  # fails if the update is missing


@functools.cache
def gradients(case, dtype, aux=0.4):
    sample, model = read(f"case_{case}"), network(dtype).train()
    # The authors' class weights are float32 values, also in their float64 run.
    class_weight = torch.tensor(CITYSCAPES).to(dtype)
    loss = SegmentationLoss(class_weight, align_corners=True, aux=aux)
    total, _ = loss(model(sample["x"].to(dtype)), sample["label"], label_weight(sample["label"], class_weight))
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def norm_differences(case, dtype, **loss):
    """Return relative differences of gradient norms from the authors' float64 norms, without the two zero gradients."""
    _, actual = gradients(case, dtype, **loss)
    expected = summary(case)["grad_norm_fp64"]
    assert actual.keys() == expected.keys()
    names = [name for name in expected if name not in ZERO_GRADIENT]
    return torch.tensor([abs(actual[name].double().norm().item() / expected[name] - 1) for name in names])


@cases
def test_loss_and_gradient_norms_equal_the_authors_in_float64(case):
    total, actual = gradients(case, torch.float64)
    assert total == pytest.approx(summary(case)["train_loss_fp64"], rel=1e-12)
    assert norm_differences(case, torch.float64).max() < 1e-6
    assert all(actual[name].abs().max() < 1e-12 for name in ZERO_GRADIENT)


@cases
def test_loss_and_gradient_norms_equal_the_authors_in_float32(case):
    total, actual = gradients(case, torch.float32)
    assert total == pytest.approx(summary(case)["train_loss_fp32"], rel=1e-5)
    differences = norm_differences(case, torch.float32)
    assert differences.median() < 2e-3
    assert differences.max() < 5e-2
    assert all(actual[name].abs().max() < 1e-6 for name in ZERO_GRADIENT)


@cases
@dtypes
def test_gradients_equal_the_authors(case, dtype):
    _, actual = gradients(case, dtype)
    bound = 5e-2 if dtype == torch.float32 else 1e-6
    for name, expected in read(f"case_{case}")["grads"].items():
        if name not in ZERO_GRADIENT:
            assert (actual[name] - expected).double().norm() < bound * expected.double().norm()


def test_another_loss_weight_exceeds_the_bounds():
    assert norm_differences("a", torch.float64, aux=0.4001).max() > 1e-5
    differences = norm_differences("a", torch.float32, aux=0.5)
    assert differences.median() > 2e-3
    assert differences.max() > 5e-2


@cases
def test_the_output_of_every_layer_equals_the_authors(case):
    model, actual = network(torch.float64, low_resolution=False).eval(), {}  # with the authors' layer order

    def record(name, _, __, y):
        actual[name] = y.mean().item(), y.abs().mean().item()

    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, Norm))}
    full_output = ("layer1", "conv3x3_ocr", "aux_head", "ocr_distri_head")
    for name, module in (layers | {name: model.get_submodule(name) for name in full_output}).items():
        module.register_forward_hook(functools.partial(record, name))
    with torch.no_grad():
        model(read(f"case_{case}")["x"].double())
    expected = summary(case)["layer_out_mean_absmean_fp64"]
    assert len(layers) == 316 + 314
    assert len(actual) == len(layers) + len(full_output)
    for name, values in actual.items():
        assert values == pytest.approx(expected[name], rel=1e-9, abs=1e-10), name


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("a", {"align_corners": False}),
        ("a", {"fuse_resize": "nearest"}),
        ("b", {"double_resize": True}),
        ("a", {"same_padding": True}),
        ("a", {"head_eps": 1e-4}),
        ("a", {"head_activation_slope": 0.01}),
    ],
    ids=str,
)
def test_another_layer_rule_changes_the_outputs(case, change, monkeypatch):
    monkeypatch.setitem(architecture.VARIANTS, "changed", architecture.Variant(**change))
    sample = read(f"case_{case}")
    aux, ocr = outputs(case, variant="changed")
    assert (
        max(largest_difference(aux, sample["aux"]), largest_difference(ocr, sample["ocr"])) > 1e-4
    )  # ten times the bound


def test_mmseg_differs_where_sizes_are_odd():
    even, odd = read("case_a"), read("case_b")
    for name, logits in zip(("aux", "ocr"), outputs("a", variant="mmseg"), strict=True):
        assert largest_difference(logits, even[f"{name}_align_corners_false"]) < 1e-5
    aux, ocr = outputs("b", variant="mmseg")  # differences measured with mmsegmentation 1.2.2 itself
    assert largest_difference(aux, odd["aux_align_corners_false"]) == pytest.approx(0.16, abs=0.01)
    assert largest_difference(ocr, odd["ocr_align_corners_false"]) == pytest.approx(0.06, abs=0.01)


def test_paddleseg_differs_where_sizes_are_even():
    even, odd = read("case_a"), read("case_b")
    for name, logits in zip(("aux", "ocr"), outputs("b", variant="paddleseg"), strict=True):
        assert largest_difference(logits, odd[f"{name}_align_corners_false"]) < 1e-5
    aux, ocr = outputs("a", variant="paddleseg")  # differences measured with PaddleSeg 2.8 itself
    assert largest_difference(aux, even["aux_align_corners_false"]) == pytest.approx(3.2, abs=0.1)
    assert largest_difference(ocr, even["ocr_align_corners_false"]) == pytest.approx(1.2, abs=0.1)


def test_names_shapes_and_order_equal_the_authors():
    theirs = {k: tuple(v.shape) for k, v in read("state_dict").items() if not k.endswith("num_batches_tracked")}
    table = architecture.shapes(Arch(width=6, channels=48, key_channels=24))
    assert list(table.items()) == list(theirs.items())


@pytest.mark.parametrize(
    "arch",
    [
        *(Arch(width=width) for width in (18, 32, 48)),
        *(
            Arch(width=18, blocks=2, modules=(1, 3, 2), num_classes=11, variant=variant)
            for variant in architecture.VARIANTS
        ),
    ],
    ids=str,
)
def test_state_has_the_canonical_names(arch):
    with torch.device("meta"):
        model = OCRNet(arch)
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == [
        *architecture.shapes(arch).items()
    ]
    assert {name for name, _ in model.named_parameters()} == {
        n for n in architecture.shapes(arch) if not architecture.is_buffer(n)
    }
    assert {name for name, _ in model.named_buffers()} == {
        n for n in architecture.shapes(arch) if architecture.is_buffer(n)
    }


@pytest.mark.parametrize("variant", architecture.VARIANTS)
def test_no_python_branch_depends_on_tensor_values(variant):
    """Tensors on the meta device have no values, so a step that runs there can be captured or compiled."""
    arch = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8, variant=variant)
    with torch.device("meta"):
        model = OCRNet(arch)
        dropout_mask = torch.ones(2, architecture.head_channels(arch), dtype=torch.bool)
        label, weight = torch.zeros(2, 45, 70, dtype=torch.uint8), torch.ones(5)
        actual = model(torch.zeros(2, 3, 45, 70), dropout_mask)
        for ohem in (None, (0.9, 1000)):
            loss = SegmentationLoss(weight, arch.rule.align_corners, ohem=ohem)
            loss(actual, label, label_weight(label, weight))[0].backward(retain_graph=True)
    assert [tuple(y.shape) for y in actual] == [(2, 5, 12, 18)] * 2


def test_dropout_scales_the_kept_channels_of_the_ocr_head():
    model, x = network(dropout=0.25).eval(), read("case_b")["x"]
    features = []
    model.cls_head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    dropout_mask = torch.arange(48)[None] % 3 > 0
    with torch.no_grad():
        full_aux, full_output = model(x)
        aux, dropped = model(x, dropout_mask)
        _, all_kept = model(x, torch.ones(1, 48))
    assert torch.equal(aux, full_aux)
    assert not torch.equal(dropped, full_output)
    assert torch.allclose(features[1], features[0] * dropout_mask[:, :, None, None] / 0.75)
    assert torch.allclose(features[2], features[0] / 0.75)
    assert not torch.equal(all_kept, full_output)


def test_creating_a_network_uses_no_random_numbers():
    before = torch.get_rng_state()
    model = OCRNet(Arch(width=6, blocks=1, modules=(1, 1, 1), channels=16, key_channels=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.conv1.weight.any()


@pytest.mark.parametrize("size", [(32, 32), (32, 47), (65, 33)])
def test_any_image_size_from_32_is_accepted(size):
    x = torch.zeros(1, 3, *size)
    with torch.no_grad():
        aux, ocr = network().eval()(x)
    assert aux.shape == ocr.shape == (1, 19, -(-size[0] // 4), -(-size[1] // 4))
    assert ocr.isfinite().all()
