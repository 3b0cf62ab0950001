"""Names of NVIDIA/semantic-segmentation, `network/ocrnet.py`: an extra nesting level changes three of the authors'."""

from ocrnet.weights.family import NESTED, OWNERS, Family

FAMILY = Family(
    title="NVIDIA semantic-segmentation",
    variant="nvidia",
    mark=r"ocr\.",
    heads={f"ocr.{NESTED.get(owner, owner)}": owner for owner in OWNERS},
    backbone="backbone.",
    left_out=r"scale_attn\.",
    note="this is its network at one scale: scale_attn, which weighs several against each other, has no place here",
)
