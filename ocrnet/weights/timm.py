"""Names of HRNet for ImageNet: the authors' HRNet-Image-Classification, and timm, which has the same names.

Both use nearest-neighbor resizing between branches, unlike the segmentation networks that start from their weights.
"""

from ocrnet.weights.family import CLASSIFIER, Family

FAMILY = Family(
    title="HRNet for ImageNet (the authors, timm)",
    variant="hrnet",
    mark=r"(incre_modules|downsamp_modules)\.",
    heads={},
    left_out=CLASSIFIER,
    note="it was trained with nearest-neighbor resizing between branches, so use it only to initialize a backbone",
)
