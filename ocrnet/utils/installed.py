"""Optional libraries: check whether one is installed, and report how to install it."""

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
    """Return whether a library can be imported, without importing it; a folder with its name does not count."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def check_installed(name: str, why: str) -> None:
    """Raise `OcrnetError` with installation instructions if an optional library is missing; import nothing."""
    if not installed(name):
        raise OcrnetError(f"{why} needs {name}, which is not installed: {INSTALL[name]}")


def need(name: str, why: str) -> ModuleType:
    """Import an optional library; raise `OcrnetError` with installation instructions if it is missing."""
    check_installed(name, why)
    return importlib.import_module(name)
