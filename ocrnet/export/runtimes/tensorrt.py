"""Run TensorRT plans on an NVIDIA GPU, with PyTorch for the device memory.

This code has never run, because no GPU was available.
"""

import json
from pathlib import Path

import numpy as np

from ocrnet.export.formats import BESIDE
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional


class TensorRTSession:
    """See `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        trt, self.torch = import_optional("tensorrt", f"running {path}"), import_optional("torch", f"running {path}")
        if not self.torch.cuda.is_available():
            raise OcrnetError(f"{path} needs an NVIDIA GPU, but PyTorch finds none")
        beside = path.with_name(path.name + BESIDE)
        self.document = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise OcrnetError(
                f"{path}: TensorRT {trt.__version__} rejects it; a plan works with one version and one GPU type"
            )
        self.engine, self.context = engine, engine.create_execution_context()
        self.input, self.output = engine.get_tensor_name(0), engine.get_tensor_name(1)
        self.runtime = f"tensorrt {trt.__version__}"
        self.notes = [f"device: GPU ({self.torch.cuda.get_device_name()})"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output."""
        torch = self.torch
        given = torch.from_numpy(x).cuda()
        self.context.set_input_shape(self.input, tuple(given.shape))
        kind = torch.uint8 if "UINT8" in str(self.engine.get_tensor_dtype(self.output)) else torch.float32
        answer = torch.empty(tuple(self.context.get_tensor_shape(self.output)), dtype=kind, device="cuda")
        self.context.set_tensor_address(self.input, given.data_ptr())
        self.context.set_tensor_address(self.output, answer.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise OcrnetError("TensorRT could not run the network; see its message above")
        stream.synchronize()
        return answer.cpu().numpy()
