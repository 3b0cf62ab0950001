"""The session for TorchScript files in PyTorch on a CPU."""

import json
import warnings
from pathlib import Path

import numpy as np

from ocrnet.export.formats import DOCUMENT
from ocrnet.utils.installed import import_optional


class TorchScriptSession:
    """A TorchScript file; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        self.torch = torch = import_optional("torch", f"running {path}")
        extra_files = {f"{DOCUMENT}.json": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hides the deprecation warning of TorchScript
            self.module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra_files).eval()
        text = extra_files[f"{DOCUMENT}.json"]
        self.document = json.loads(text) if text else None
        self.runtime = f"torch.jit {torch.__version__}"
        self.notes = [f"device: CPU, {torch.get_num_threads()} threads"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output."""
        with self.torch.inference_mode():
            return self.module(self.torch.from_numpy(x)).numpy()
