"""Files of torch.export (.pt2) in PyTorch, on a CPU."""

import json
from pathlib import Path

import numpy as np

from ocrnet.exported import DOCUMENT, need


class TorchExportSession:
    """See `ocrnet.exported.Session`."""

    def __init__(self, path: Path) -> None:
        self.torch = torch = need("torch", f"running {path}")
        inside = {f"{DOCUMENT}.json": ""}
        self.module = torch.export.load(str(path), extra_files=inside).module()
        text = inside[f"{DOCUMENT}.json"]
        self.document = json.loads(text) if text else None
        self.runtime = f"torch.export {torch.__version__}"
        self.notes = [f"device: CPU, {torch.get_num_threads()} threads"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output."""
        with self.torch.inference_mode():
            return self.module(self.torch.from_numpy(x)).numpy()
