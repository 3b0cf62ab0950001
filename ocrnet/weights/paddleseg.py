"""Names of PaddleSeg's OCRNet, `paddleseg/models/ocrnet.py` and `backbones/hrnet.py`, for heads and backbone."""

import re

from ocrnet.weights.family import Family, owners

_ATTENTION = "head.spatial_ocr.attention_block"

# Pattern of PaddleSeg's block, and the canonical owners of its convolution and norm. The pattern's groups with an
# uppercase name match numbers that count from 1; canonical numbers count from 0.
BRANCHES = (
    (r"conv_layer1_(?P<i>\d)", "conv{i}", "bn{i}"),
    (r"la1\.bb_layer2_(?P<N>\d+)\.conv(?P<i>\d)", "layer1.{N}.conv{i}", "layer1.{N}.bn{i}"),
    (r"la1\.bb_layer2_(?P<N>\d+)\.conv_down", "layer1.{N}.downsample.0", "layer1.{N}.downsample.1"),
    (r"tr1\.transition_tr1_layer_1", "transition1.0.0", "transition1.0.1"),
    (r"tr(?P<t>\d)\.transition_tr\d_layer_(?P<I>\d)", "transition{t}.{I}.0.0", "transition{t}.{I}.0.1"),
    (
        r"st(?P<s>\d)\.stage_st\d_(?P<M>\d+)\.branches_func\.bb_st\d_\d+_branch_layer_(?P<B>\d)_(?P<N>\d+)\.conv(?P<i>\d)",
        "stage{s}.{M}.branches.{B}.{N}.conv{i}",
        "stage{s}.{M}.branches.{B}.{N}.bn{i}",
    ),
    (
        r"st(?P<s>\d)\.stage_st\d_(?P<M>\d+)\.fuse_func\.residual_st\d_\d+_layer_(?P<I>\d)_(?P<J>\d)",
        "stage{s}.{M}.fuse_layers.{I}.{J}.0",
        "stage{s}.{M}.fuse_layers.{I}.{J}.1",
    ),
    (
        r"st(?P<s>\d)\.stage_st\d_(?P<M>\d+)\.fuse_func\.residual_st\d_\d+_layer_(?P<I>\d)_(?P<J>\d)_(?P<K>\d)",
        "stage{s}.{M}.fuse_layers.{I}.{J}.{K}.0",
        "stage{s}.{M}.fuse_layers.{I}.{J}.{K}.1",
    ),
)


def branches(owner: str) -> str:
    """Translate the path of a module of PaddleSeg's backbone to its canonical path; return any other path unchanged.

    The path is a parameter's name without its last part.
    """
    block, _, last = owner.rpartition(".")
    for pattern, *ours in BRANCHES:
        if last in ("_conv", "_batch_norm") and (match := re.fullmatch(pattern, block)):
            numbers = {key: int(value) - key.isupper() for key, value in match.groupdict().items()}
            return ours[last == "_batch_norm"].format(**numbers)
    return owner


FAMILY = Family(
    title="PaddleSeg",
    variant="paddleseg",
    mark=r"(backbone\.)?conv_layer1_1\.|head\.spatial_ocr\.",
    heads=owners(
        "_conv",
        "_batch_norm",
        cls_head="head.cls_head",
        aux_head="head.aux_head.1",
        blocks={
            "aux_head": "head.aux_head.0",
            "conv3x3_ocr": "head.conv3x3_ocr",
            "f_pixel.0": f"{_ATTENTION}.f_pixel.0",
            "f_pixel.1": f"{_ATTENTION}.f_pixel.1",
            "f_object.0": f"{_ATTENTION}.f_object.0",
            "f_object.1": f"{_ATTENTION}.f_object.1",
            "f_down": f"{_ATTENTION}.f_down",
            "f_up": f"{_ATTENTION}.f_up",
            "conv_bn_dropout": "head.spatial_ocr.conv1x1.0",
        },
    ),
    backbone="backbone.",
    branches=branches,
    parts={"_mean": "running_mean", "_variance": "running_var"},
    normalization=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)
