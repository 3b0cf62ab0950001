"""OCRNet (HRNet + object-contextual representations) for semantic segmentation."""

from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import block_signals

with block_signals():  # NumPy starts threads, which would otherwise receive signals meant for the main thread
    import numpy  # noqa: F401

from ocrnet.predict.model import Model, load
from ocrnet.utils.version import __version__

__all__ = ["Model", "OcrnetError", "__version__", "load"]
