"""OCRNet (HRNet + object-contextual representations) for semantic segmentation."""

__version__ = "0.1.0"
