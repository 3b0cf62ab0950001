"""Optional libraries: check whether one is installed, and raise an error with the command that installs it."""

import importlib
import importlib.util
from types import ModuleType

from ocrnet.utils.errors import OcrnetError

INSTALL = {
    "torch": "pip install -r requirements.txt",
    "mindspore": "from a clone, pip install -e '.[mindspore]'",
    "onnx": "from a clone, pip install -e '.[onnx]'",
    "onnxruntime": "from a clone, pip install -e '.[onnx]'",
    "openvino": "from a clone, pip install -e '.[openvino]'",
    "fastapi": "from a clone, pip install -e '.[serve]'",
    "uvicorn": "from a clone, pip install -e '.[serve]'",
    "tensorrt": "install NVIDIA's TensorRT on a machine with an NVIDIA GPU",
}


def installed(name: str) -> bool:
    """Return whether a library is installed, without importing it; a folder with its name is not a library."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def check_installed(name: str, purpose: str) -> None:
    """Raise `OcrnetError` with installation instructions if an optional library is missing; do not import it.

    ``purpose`` begins the message: "PURPOSE needs NAME".
    """
    if not installed(name):
        raise OcrnetError(f"{purpose} needs {name}, which is not installed: {INSTALL[name]}")


def import_optional(name: str, purpose: str) -> ModuleType:
    """Import and return an optional library; raise `OcrnetError` as `check_installed` does if it is missing."""
    check_installed(name, purpose)
    return importlib.import_module(name)
