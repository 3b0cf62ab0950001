"""Names of the HRNet-OCR authors, which are the canonical names; their HRNet without OCR calls its head last_layer."""

import re

from ocrnet.weights.family import OWNERS, Family

FAMILY = Family(
    title="HRNet-OCR (the authors)",
    variant="hrnet",
    mark=r"conv3x3_ocr\.|last_layer\.|conv1\.weight$",
    heads={owner: owner for owner in OWNERS}
    | {owner.replace("aux_head", "last_layer"): owner for owner in OWNERS if re.match("aux_head", owner)},
)
