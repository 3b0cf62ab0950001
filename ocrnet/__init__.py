"""OCRNet (HRNet + object-contextual representations) for semantic segmentation."""

from ocrnet.errors import OcrnetError
from ocrnet.signals import signals_held

with signals_held():  # NumPy starts threads, which would take signals from where they are waited for
    import numpy  # noqa: F401

from ocrnet.model import Model, load

__all__ = ["Model", "OcrnetError", "load"]
__version__ = "0.1.0"
