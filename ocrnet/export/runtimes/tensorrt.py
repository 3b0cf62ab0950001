"""The session for TensorRT plans on an NVIDIA GPU, with PyTorch for the device memory.

This code is untested, because no GPU was available.
"""

import json
from pathlib import Path

import numpy as np

from ocrnet.export.formats import SIDECAR_SUFFIX
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional


class TensorRTSession:
    """A TensorRT plan; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        trt, self.torch = import_optional("tensorrt", f"running {path}"), import_optional("torch", f"running {path}")
        if not self.torch.cuda.is_available():
            raise OcrnetError(f"{path} needs an NVIDIA GPU, but PyTorch finds none")
        sidecar = path.with_name(path.name + SIDECAR_SUFFIX)
        self.document = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise OcrnetError(
                f"{path}: TensorRT {trt.__version__} rejects the plan; a plan runs only with the "
                "version and GPU type that built it"
            )
        self.engine, self.context = engine, engine.create_execution_context()
        self.input, self.output = engine.get_tensor_name(0), engine.get_tensor_name(1)
        self.runtime = f"tensorrt {trt.__version__}"
        self.notes = [f"device: GPU ({self.torch.cuda.get_device_name()})"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output."""
        torch = self.torch
        device_input = torch.from_numpy(x).cuda()
        self.context.set_input_shape(self.input, tuple(device_input.shape))
        dtype = torch.uint8 if "UINT8" in str(self.engine.get_tensor_dtype(self.output)) else torch.float32
        output = torch.empty(tuple(self.context.get_tensor_shape(self.output)), dtype=dtype, device="cuda")
        self.context.set_tensor_address(self.input, device_input.data_ptr())
        self.context.set_tensor_address(self.output, output.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise OcrnetError("TensorRT could not run the network; see its message above")
        stream.synchronize()
        return output.cpu().numpy()
