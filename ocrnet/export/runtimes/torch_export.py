"""The session for torch.export files (.pt2) in PyTorch on a CPU."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.export.formats import DOCUMENT
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional


class TorchExportSession:
    """A torch.export file; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        self.torch = torch = import_optional("torch", f"running {path}")
        _refuse_pickles(path, torch)
        extra_files = {f"{DOCUMENT}.json": ""}
        self.module = torch.export.load(str(path), extra_files=extra_files).module()
        text = extra_files[f"{DOCUMENT}.json"]
        self.document = json.loads(text) if text else None
        self.runtime = f"torch.export {torch.__version__}"
        self.notes = [f"device: CPU, {torch.get_num_threads()} threads"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output."""
        with self.torch.inference_mode():
            return self.module(self.torch.from_numpy(x)).numpy()


def _refuse_pickles(path: Path, torch: Any) -> None:
    """Raise `OcrnetError` if loading the file would unpickle objects, which can run code; exports hold only tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pt"):
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                elif name.endswith(".json") and _has_pickle(json.loads(archive.read(name) or b"null")):
                    raise ValueError(name)
    except Exception as error:
        raise OcrnetError(
            f"{path} is damaged, or loading it could run code ({type(error).__name__}); export it again"
        ) from error


def _has_pickle(node: Any) -> bool:
    if isinstance(node, dict):
        return bool(node.get("use_pickle")) or any(_has_pickle(value) for value in node.values())
    return isinstance(node, list) and any(_has_pickle(value) for value in node)
