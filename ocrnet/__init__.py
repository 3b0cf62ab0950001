"""OCRNet (HRNet + object-contextual representations) for semantic segmentation."""

from ocrnet.errors import OcrnetError
from ocrnet.model import Model, load

__all__ = ["Model", "OcrnetError", "load"]
__version__ = "0.1.0"
