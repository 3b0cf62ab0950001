"""The session for OpenVINO .xml and .bin files on a CPU, in float32, or on request in bfloat16 where supported."""

import json
from pathlib import Path

import numpy as np

from ocrnet.export.formats import DOCUMENT
from ocrnet.export.runtimes import threads
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional


class OpenVinoSession:
    """An OpenVINO file; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path, mix: bool = False) -> None:
        ov = import_optional("openvino", f"running {path}")
        if not path.with_suffix(".bin").is_file():
            raise OcrnetError(f"{path}: its weights, {path.with_suffix('.bin').name}, are missing")
        core = ov.Core()
        model = core.read_model(path)
        text = model.get_rt_info(DOCUMENT).value if model.has_rt_info(DOCUMENT) else None
        self.document = json.loads(text) if text else None
        use_bfloat16 = mix and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        # Without the hint, OpenVINO uses bfloat16 on a CPU that supports it.
        options = {"INFERENCE_PRECISION_HINT": "bf16" if use_bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads()}
        self.compiled = core.compile_model(model, "CPU", options)
        self.runtime = f"openvino {ov.__version__.partition('-')[0]}"
        precision = (
            "bfloat16" if use_bfloat16 else "float32, because this CPU does not support bfloat16" if mix else "float32"
        )
        self.notes = [f"device: CPU, {threads()} threads", f"mix: {precision}"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the first output."""
        return np.array(self.compiled(x)[0])
