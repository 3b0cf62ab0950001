"""The version of the package; `ocrnet.__version__` is the same."""

__version__ = "0.1.0"
