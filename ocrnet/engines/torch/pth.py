"""Reading PyTorch weights files without running code from them."""

import pickle
from pathlib import Path

import numpy as np
import torch

from ocrnet.errors import OcrnetError

WRAPPERS = ("state_dict", "model")


def read(path: Path) -> dict[str, np.ndarray]:
    """Return {name: array} of a ``.pth`` state dict, ``state_dict`` wrappers peeled; refuse everything but tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OcrnetError(f"weights file '{path}' does not exist") from None
    except pickle.UnpicklingError:
        raise OcrnetError(
            f"weights file '{path}' is damaged, or holds more than tensors: reading it could run code, so it is "
            "refused; save its state_dict() alone, where you trust its source"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OcrnetError(f"weights file '{path}' cannot be read as PyTorch weights: {reason}") from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(v, torch.Tensor) for v in content.values()):
        raise OcrnetError(f"weights file '{path}' holds no state dict of tensors")
    return {name: v.float().numpy() for name, v in content.items() if isinstance(v, torch.Tensor)}
