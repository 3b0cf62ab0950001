"""The session for ONNX files in ONNX Runtime on a CPU."""

import json
from pathlib import Path

import numpy as np

from ocrnet.export.formats import DOCUMENT
from ocrnet.export.runtimes import threads
from ocrnet.utils.installed import import_optional


class OnnxSession:
    """An ONNX file; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        runtime = import_optional("onnxruntime", f"running {path}")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads()
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        text = self.session.get_modelmeta().custom_metadata_map.get(DOCUMENT)
        self.document = json.loads(text) if text else None
        self.runtime = f"onnxruntime {runtime.__version__}"
        self.notes = [f"device: CPU, {threads()} threads"]
        self.input = self.session.get_inputs()[0].name

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the first output."""
        return self.session.run(None, {self.input: x})[0]
