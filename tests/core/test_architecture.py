import dataclasses
import math

import numpy as np
import pytest

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.utils.errors import OcrnetError

SMALL = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
ARCHS = [
    Arch(width=18),
    Arch(width=48, num_classes=11),
    Arch(width=32, blocks=2, modules=(1, 3, 2), channels=256, key_channels=128),
    SMALL,
    Arch(width=6, blocks=11, modules=(2, 1, 12), variant="openseg"),
    Arch(width=18, variant="mindspore"),
]


@pytest.mark.parametrize(("width", "millions"), [(18, 12.081), (32, 32.954), (48, 70.373)])
def test_parameter_counts_match_the_published_networks(width, millions):
    assert architecture.num_parameters(Arch(width=width)) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_every_width_has_as_many_tensors_as_the_authors_network():
    for width in (18, 32, 48):
        assert len(architecture.shapes(Arch(width=width))) == 1890 - 314  # without num_batches_tracked


@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_infer_recovers_an_arch_from_its_shapes(arch):
    table = architecture.shapes(arch)
    assert architecture.infer(table, variant=arch.variant) == arch
    architecture.check(table, arch, "x")


def test_infer_keeps_the_given_resize_rule():
    assert architecture.infer(architecture.shapes(SMALL), align_corners=False) == dataclasses.replace(
        SMALL, align_corners=False
    )


def test_infer_lists_missing_tensors():
    table = {name: shape for name, shape in architecture.shapes(SMALL).items() if architecture.is_backbone(name)}
    with pytest.raises(OcrnetError, match=r"missing: conv3x3_ocr\.0\.weight, ocr_distri_head.*, cls_head\.weight$"):
        architecture.infer(table)
    with pytest.raises(OcrnetError, match=r"missing: stage2.*stage2\.0 and 2 more$"):
        architecture.infer({})


def test_check_lists_all_differences():
    table = architecture.shapes(SMALL)
    del table["conv1.weight"]
    table["cls_head.weight"] = (7, 16, 1, 1)
    table |= {f"incre_modules.{i}": (1,) for i in range(8)}
    with pytest.raises(OcrnetError) as caught:
        architecture.check(table, SMALL, "some.pth")
    message = str(caught.value)
    assert message.startswith("some.pth: does not fit the network (width 6, ")
    assert "1 missing: conv1.weight;" in message
    assert "8 unexpected: incre_modules.0, " in message
    assert "incre_modules.4 and 3 more" in message
    assert "1 with another shape: cls_head.weight (7, 16, 1, 1), expected (5, 16, 1, 1)." in message


@pytest.mark.parametrize("variant", architecture.VARIANTS)
def test_check_rejects_variants_with_other_shapes(variant):
    rule = architecture.VARIANTS[variant]
    table = architecture.shapes(dataclasses.replace(SMALL, variant=variant))
    if rule.aux_kernel == 1 and rule.bottleneck_kernel == 1:
        architecture.check(table, SMALL, "x")
    else:
        with pytest.raises(OcrnetError, match="with another shape"):
            architecture.check(table, SMALL, "x")


def test_variants_change_the_shapes_that_they_define():
    assert architecture.shapes(Arch(variant="openseg"))["aux_head.0.weight"] == (720, 720, 3, 3)
    mindspore = Arch(variant="mindspore")
    assert architecture.shapes(mindspore)["ocr_distri_head.conv_bn_dropout.0.weight"] == (256, 1024, 3, 3)
    assert architecture.shapes(mindspore)["cls_head.weight"] == (19, 256, 1, 1)
    assert architecture.head_channels(mindspore) == 256
    assert architecture.head_channels(Arch()) == 512


def test_each_variant_differs_from_the_default_as_listed():
    changed = {
        name: {
            key: value
            for key, value in dataclasses.asdict(rule).items()
            if value != getattr(architecture.Variant(), key)
        }
        for name, rule in architecture.VARIANTS.items()
    }
    assert dataclasses.astuple(architecture.Variant()) == (True, "bilinear", False, False, 1e-5, 1, 1, None, 0.0)
    assert changed == {
        "hrnet": {},
        "openseg": {"aux_kernel": 3},
        "openseg_inplace": {"aux_kernel": 3, "head_activation_slope": 0.01},
        "nvidia": {"align_corners": False},
        "mmseg": {"align_corners": False, "double_resize": True},
        "paddleseg": {"align_corners": False, "same_padding": True},
        "mindspore": {
            "align_corners": False,
            "fuse_resize": "nearest",
            "head_eps": 1e-4,
            "bottleneck_kernel": 3,
            "bottleneck_out": 256,
        },
    }


def test_rule_uses_align_corners_of_the_arch():
    assert Arch().rule.align_corners
    assert not Arch(align_corners=False).rule.align_corners
    assert Arch(variant="mmseg", align_corners=True).rule == dataclasses.replace(
        architecture.VARIANTS["mmseg"], align_corners=True
    )


def test_names_are_classified_as_buffers_norms_and_backbone():
    table = architecture.shapes(SMALL)
    norms = {name.rpartition(".")[0] for name in table if architecture.is_buffer(name)}
    assert {name for name in table if architecture.is_norm(name)} == {n for n in table if n.rpartition(".")[0] in norms}
    assert all(len(table[name]) == 1 for name in table if architecture.is_norm(name))
    heads = {name.split(".")[0] for name in table if not architecture.is_backbone(name)}
    assert heads == {"conv3x3_ocr", "ocr_distri_head", "cls_head", "aux_head"}


def test_decay_modes_select_the_documented_parameters():
    parameters = [name for name in architecture.shapes(SMALL) if not architecture.is_buffer(name)]
    groups = {mode: {name for name in parameters if architecture.decays(name, mode)} for mode in architecture.DECAYS}
    biases = {"conv3x3_ocr.0.bias", "aux_head.0.bias", "aux_head.3.bias", "cls_head.bias"}
    assert groups["all"] == set(parameters)
    assert groups["no_norm"] - groups["weights_only"] == biases
    assert all(len(architecture.shapes(SMALL)[name]) == 4 for name in groups["weights_only"])
    assert groups["all"] - groups["no_norm"] == {name for name in parameters if architecture.is_norm(name)}


def test_init_depends_on_tensor_name_and_seed():
    state = architecture.init(SMALL, 1)
    assert {name: value.shape for name, value in state.items()} == architecture.shapes(SMALL)
    assert all(value.dtype == np.float32 for value in state.values())
    again, other = architecture.init(SMALL, 1), architecture.init(SMALL, 2)
    assert all(np.array_equal(state[name], again[name]) for name in state)
    drawn = [name for name in state if not architecture.is_norm(name)]
    assert not any(np.array_equal(state[name], other[name]) for name in drawn)
    same_shape = [f"stage4.0.branches.3.0.conv{i}.weight" for i in (1, 2)]
    assert not np.array_equal(*(state[name] for name in same_shape))
    more_classes = architecture.init(dataclasses.replace(SMALL, num_classes=9), 1)
    assert np.array_equal(
        state["stage4.0.branches.3.0.conv2.weight"], more_classes["stage4.0.branches.3.0.conv2.weight"]
    )


def test_init_has_the_expected_standard_deviations():
    arch = Arch(width=18, blocks=1, modules=(1, 1, 1))
    kaiming, normal = architecture.init(arch, 0), architecture.init(arch, 0, "normal")
    name = "stage4.0.branches.3.0.conv1.weight"  # 144, 144, 3, 3
    assert kaiming[name].std() == pytest.approx(math.sqrt(2 / (144 * 9)), rel=0.01)
    assert normal[name].std() == pytest.approx(0.001, rel=0.01)
    assert kaiming["transition1.1.0.0.weight"].std() == pytest.approx(
        math.sqrt(2 / (36 * 9)), rel=0.01
    )  # 36, 256, 3, 3
    for name, fan_in in (("conv3x3_ocr.0.weight", 270 * 9), ("conv3x3_ocr.0.bias", 270 * 9), ("cls_head.bias", 512)):
        bound = 1 / math.sqrt(fan_in)
        assert np.array_equal(kaiming[name], normal[name])
        assert 0.8 * bound < np.abs(kaiming[name]).max() <= bound
        assert abs(kaiming[name].mean()) < 0.5 * bound
    for name, value in kaiming.items():
        if architecture.is_norm(name):
            assert np.all(value == (1 if name.endswith(("weight", "running_var")) else 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "openseq"}, "did you mean 'openseg'"),
        ({"width": 0}, "width: 0 is not allowed"),
        ({"modules": (1, 0, 1)}, r"modules: \(1, 0, 1\)"),
        ({"modules": (1, 4)}, r"modules: \(1, 4\)"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_arch_refuses_invalid_values(change, message):
    with pytest.raises(OcrnetError, match=message):
        Arch(**change)


def test_init_refuses_an_unknown_initializer():
    with pytest.raises(OcrnetError, match="unknown 'xavier'; allowed: kaiming, normal"):
        architecture.init(SMALL, 0, "xavier")
