"""Names of openseg.pytorch, `lib/models/nets/hrnet.py: HRNet_W48_OCR`, with PyTorch's batch norm or with inplace_abn.

inplace_abn combines norm and activation in one module, so the names of its tensors have one level less. The activation
is in `architecture.VARIANTS`. In `configs/cityscapes/H_48_D_4.json`, input_mode is BGR, but the channels are normalized
in this order with ImageNet's values of red, green and blue. Therefore `_REVERSED` has the values in reverse order.
"""

import dataclasses
import re

from ocrnet.weights.family import IMAGENET, NESTED, OWNERS, Family

_MEAN, _STD = IMAGENET
_REVERSED = (_MEAN[2], _MEAN[1], _MEAN[0]), (_STD[2], _STD[1], _STD[0])
_HEADS = {NESTED.get(owner, owner).replace("conv3x3_ocr", "conv3x3"): owner for owner in OWNERS}

FAMILY = Family(
    title="openseg.pytorch",
    variant="openseg",
    mark=r"conv3x3\.1\.0\.",
    heads=_HEADS,
    backbone="backbone.",
    normalization=_REVERSED,
    bgr=True,
)
INPLACE = dataclasses.replace(
    FAMILY,
    title="openseg.pytorch with inplace_abn",
    variant="openseg_inplace",
    mark=r"conv3x3\.1\.\w+$",
    heads={re.sub(r"\.([13])\.0$", r".\1", theirs): ours for theirs, ours in _HEADS.items()},
    abs_norm_weights=True,
)
