"""Files of named arrays, whoever wrote them: what kind one is, and what is in it. No code in a file is run."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt, pickles, pth
from ocrnet.weights.family import WRAPPERS

Kind = Literal["pth", "pdparams", "ckpt", "safetensors"]

# A PyTorch file is a zip archive, or a pickle of its magic number with others behind it; another pickle is Paddle's.
_ZIP, _MAGIC = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9"
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def kind(path: Path) -> Kind:
    """Tell a file by its first bytes, not by its name; what is none of the others is taken for safetensors."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise OcrnetError(f"'{path}' cannot be read: {error.strerror}") from None
    if head.startswith(_ZIP) or (head.startswith(_PICKLE) and _MAGIC in head):
        return "pth"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(_PICKLE):
        return "pdparams"
    return "ckpt" if ckpt.looks_like(head) or path.suffix == ".ckpt" else "safetensors"


def read(path: Path, what: Kind) -> dict[str, np.ndarray]:
    """Return the arrays of a file by the names in it, wrappers peeled; OcrnetError where it holds none."""
    if what == "ckpt":
        arrays = ckpt.read(path)
    elif what == "safetensors":
        arrays = checkpoint.arrays(path)
    elif what == "pth":
        arrays = pth.read(path)
    else:
        content = _unwrapped(pickles.read(path))
        arrays = {name: array for name, array in _unpaired(content) if isinstance(array, np.ndarray)}
        if not arrays:
            raise OcrnetError(f"weights file '{path}' holds no state dict of arrays")
        claimed, size = sum(array.nbytes for array in arrays.values()), path.stat().st_size
        if claimed > size:  # the same bytes, many times
            raise OcrnetError(
                f"weights file '{path}' is refused: its arrays claim {claimed:,} bytes, and the file has {size:,}"
            )
    return arrays


def _unwrapped(content: Any) -> dict[Any, Any]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content if isinstance(content, dict) else {}


def _unpaired(content: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Take Paddle's pairs (the parameter's other name, its array) apart."""
    pairs = (
        (name, value[1] if isinstance(value, tuple) and len(value) == 2 else value) for name, value in content.items()
    )
    return [(name, value) for name, value in pairs if isinstance(name, str)]
