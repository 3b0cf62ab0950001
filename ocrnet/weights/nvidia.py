"""Parameter names of NVIDIA/semantic-segmentation (`network/ocrnet.py`); three modules are nested one level deeper than
in the code of the OCRNet authors."""

from ocrnet.weights.family import NESTED, OWNERS, Family

FAMILY = Family(
    title="NVIDIA semantic-segmentation",
    variant="nvidia",
    mark=r"ocr\.",
    heads={f"ocr.{NESTED.get(owner, owner)}": owner for owner in OWNERS},
    backbone="backbone.",
    left_out=r"scale_attn\.",
    note="only the network at one scale is used: scale_attn, which weights several scales, is not supported",
)
