"""Files of named arrays from any implementation: their kind and their content. No code in a file is run."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt, pickles, pth
from ocrnet.weights.family import WRAPPERS

Kind = Literal["pth", "pdparams", "ckpt", "safetensors"]

# A PyTorch file is a zip archive, or a pickle of its magic number followed by others. Any other pickle is Paddle's.
_ZIP, _MAGIC = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9"
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def kind(path: Path) -> Kind:
    """Return the kind of a file from its first bytes; fall back to the suffix ``.ckpt``, then to safetensors."""
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
    """Return the arrays of a file by its own names, without wrapper dicts; raise OcrnetError if it cannot be read."""
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
        if claimed > size:  # arrays can share the same bytes
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
    """Return names and values; a pair of Paddle (the parameter's other name, its array) is replaced by its array."""
    pairs = (
        (name, value[1] if isinstance(value, tuple) and len(value) == 2 else value) for name, value in content.items()
    )
    return [(name, value) for name, value in pairs if isinstance(name, str)]
