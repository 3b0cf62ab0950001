"""Weights files of any implementation: their file format and their arrays. No code in a file is run."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt, pickles, pth
from ocrnet.weights.family import WRAPPERS

Kind = Literal["pth", "pdparams", "ckpt", "safetensors"]

# A PyTorch file is a zip archive, or a sequence of pickles of which the first is PyTorch's magic number. Any other
# pickle is a Paddle file.
_ZIP, _MAGIC = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9"
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def kind(path: Path) -> Kind:
    """Return the file format, detected from the first bytes.

    If they are unknown, a file with the suffix ``.ckpt`` is taken as MindSpore's, any other as safetensors.
    """
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
    return "ckpt" if ckpt.is_ckpt_start(head) or path.suffix == ".ckpt" else "safetensors"


def read(path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """Return the arrays of a file of format ``kind``, by the names in the file; dicts around the weights are removed.

    Raise OcrnetError if the file cannot be read or holds no arrays.
    """
    if kind == "ckpt":
        arrays = ckpt.read(path)
    elif kind == "safetensors":
        arrays = checkpoint.arrays(path)
    elif kind == "pth":
        arrays = pth.read(path)
    else:
        content = _unwrap(pickles.read(path))
        arrays = {name: array for name, array in _drop_paddle_names(content) if isinstance(array, np.ndarray)}
        if not arrays:
            raise OcrnetError(f"weights file '{path}' holds no state dict of arrays")
        claimed, size = sum(array.nbytes for array in arrays.values()), path.stat().st_size
        if claimed > size:  # several arrays can refer to the same bytes
            raise OcrnetError(
                f"weights file '{path}' is refused: its arrays claim {claimed:,} bytes, and the file has {size:,}"
            )
    return arrays


def _unwrap(content: Any) -> dict[Any, Any]:
    """Return the innermost dict of weights, or an empty dict if there is none."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content if isinstance(content, dict) else {}


def _drop_paddle_names(content: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Return pairs of name and value; a value that is Paddle's pair (another name, array) is replaced by the array."""
    pairs = (
        (name, value[1] if isinstance(value, tuple) and len(value) == 2 else value) for name, value in content.items()
    )
    return [(name, value) for name, value in pairs if isinstance(name, str)]
