"""Names of mmsegmentation 0.x and 1.x: a cascade of FCNHead and OCRHead on HRNet."""

from ocrnet.weights.family import Family, owners

_CONTEXT = "decode_head.1.object_context_block"

FAMILY = Family(
    title="mmsegmentation",
    variant="mmseg",
    mark=r"decode_head\.",
    heads=owners(
        "conv",
        "bn",
        cls_head="decode_head.1.conv_seg",
        aux_head="decode_head.0.conv_seg",
        blocks={
            "aux_head": "decode_head.0.convs.0",
            "conv3x3_ocr": "decode_head.1.bottleneck",
            "f_pixel.0": f"{_CONTEXT}.query_project.0",
            "f_pixel.1": f"{_CONTEXT}.query_project.1",
            "f_object.0": f"{_CONTEXT}.key_project.0",
            "f_object.1": f"{_CONTEXT}.key_project.1",
            "f_down": f"{_CONTEXT}.value_project",
            "f_up": f"{_CONTEXT}.out_project",
            "conv_bn_dropout": f"{_CONTEXT}.bottleneck",
        },
    ),
    backbone="backbone.",
    biases=False,
)
