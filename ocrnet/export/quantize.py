"""ONNX in 8 bits: the convolutions, calibrated on images; ONNX Runtime and OpenVINO both compute it in integers."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ocrnet.utils.installed import need


def quantize(source: Path, target: Path, inputs: Iterator[np.ndarray]) -> None:
    """Write ``source`` with quantized convolutions, their ranges those that ``inputs`` show, weights by channel.

    The heads' attention, the sums of branches and every resize stay in float32: they cost little, and lose most.
    """
    need("onnxruntime", "int8")
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:  # None: no more
            x = next(inputs, None)
            return None if x is None else {"images": x}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to preprocess, which tracing has done
    try:
        ort.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )
    finally:
        root.setLevel(level)
