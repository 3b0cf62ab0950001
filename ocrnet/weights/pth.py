"""Reading and writing PyTorch weights files (``.pth``). Reading runs no code. PyTorch is imported on first use."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import installed
from ocrnet.weights import checkpoint
from ocrnet.weights.family import WRAPPERS

if TYPE_CHECKING:
    import torch


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a ``.pth`` state dict as {name: array}; dicts around the state dict are removed.

    float16 is unchanged, and bfloat16 becomes float32. Raise OcrnetError, which names the file, if it is damaged, could
    run code or holds no tensors, or if PyTorch is not installed.
    """
    if not installed("torch"):
        raise OcrnetError(f"{path}: reading a .pth file needs PyTorch: pip install -r requirements.txt")
    import torch

    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OcrnetError(f"weights file '{path}' does not exist") from None
    except pickle.UnpicklingError:
        raise OcrnetError(
            f"weights file '{path}' is damaged or holds other objects than tensors; reading it could run code, so it "
            "is refused; if you trust its source, save only its state dict: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OcrnetError(f"weights file '{path}' cannot be read as PyTorch weights: {reason}") from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = content if isinstance(content, dict) else {}
    tensors = {name: v for name, v in state.items() if isinstance(name, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise OcrnetError(f"weights file '{path}' holds no state dict of tensors")
    _check_total_size(path, tensors)
    try:
        return {name: (v.float() if v.dtype == torch.bfloat16 else v).detach().numpy() for name, v in tensors.items()}
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OcrnetError(f"weights file '{path}' holds tensors that are not plain arrays: {reason}") from None


def write(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None) -> None:
    """Write a state dict as ``torch.save`` does, atomically.

    Args:
        path: The file.
        tensors: The arrays by name.
        meta: If given, the file holds a dict of ``meta`` and ``state_dict`` instead of the state dict.

    Raises:
        OcrnetError: PyTorch is not installed, or the write failed.
    """
    if not installed("torch"):
        raise OcrnetError(f"{path}: writing a .pth file needs PyTorch: pip install -r requirements.txt")
    import torch

    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    buffer = io.BytesIO()
    torch.save(state if meta is None else {"meta": dict(meta), "state_dict": state}, buffer)
    checkpoint.replace(path, [buffer.getbuffer()])


def _check_zip(path: Path) -> None:
    """Raise OcrnetError if a zip archive has compressed entries, or entries larger than the file in total.

    PyTorch does not write such archives. They could unpack to a size that does not fit in memory.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, MemoryError, OverflowError, NotImplementedError) as error:
        raise OcrnetError(f"weights file '{path}' is damaged: {error}; use another copy") from None
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or claimed > size:
        reason = f"'{packed[0]}' in it is compressed" if packed else f"its entries claim {claimed:,} bytes of {size:,}"
        raise OcrnetError(f"weights file '{path}' is refused: {reason}, and PyTorch does not write such files")


def _check_total_size(path: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Raise OcrnetError if the tensors, which can be views of the same bytes, are larger than the file in total."""
    claimed, size = sum(v.numel() * v.element_size() for v in tensors.values()), path.stat().st_size
    if claimed > size:
        raise OcrnetError(
            f"weights file '{path}' is refused: its tensors claim {claimed:,} bytes, and the file has {size:,}; "
            "save a clone() of each"
        )
