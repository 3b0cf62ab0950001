"""Runtimes of exported files: one module per runtime, each with an implementation of `Session`."""

import os
from pathlib import Path

from ocrnet.export.formats import Format, Session
from ocrnet.utils.errors import OcrnetError


def open_session(kind: Format, path: Path, *, mix: bool = False) -> Session:
    """Open an exported file in its runtime.

    Args:
        kind: The format of the file.
        path: The file.
        mix: Use bfloat16; has an effect only for OpenVINO, on a CPU that supports it.

    Returns:
        The session.

    Raises:
        OcrnetError: The runtime is not installed or rejects the file.
    """
    try:
        return _open(kind, path, mix)
    except OcrnetError:
        raise
    except Exception as error:  # each runtime raises its own types, mostly plain RuntimeError
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OcrnetError(f"{path} is damaged or not a supported {kind} file: {first_line}") from error


def _open(kind: Format, path: Path, mix: bool) -> Session:
    if kind == "onnx":
        from ocrnet.export.runtimes.onnx import OnnxSession

        return OnnxSession(path)
    if kind == "openvino":
        from ocrnet.export.runtimes.openvino import OpenVinoSession

        return OpenVinoSession(path, mix)
    if kind == "torchscript":
        from ocrnet.export.runtimes.torchscript import TorchScriptSession

        return TorchScriptSession(path)
    if kind == "torch_export":
        from ocrnet.export.runtimes.torch_export import TorchExportSession

        return TorchExportSession(path)
    if kind == "mindir":
        from ocrnet.export.runtimes.mindir import MindIRSession

        return MindIRSession(path)
    from ocrnet.export.runtimes.tensorrt import TensorRTSession

    return TensorRTSession(path)


def threads() -> int:
    """Return the number of compute threads: OMP_NUM_THREADS if it is set, else the number of available cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting):
        return int(setting)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
