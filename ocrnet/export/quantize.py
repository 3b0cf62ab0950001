"""Quantization of the convolutions of an ONNX file to 8 bits, calibrated on images.

ONNX Runtime and OpenVINO compute the quantized convolutions with integer arithmetic.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ocrnet.utils.installed import import_optional


def quantize(source: Path, target: Path, inputs: Iterator[np.ndarray]) -> None:
    """Write a copy of an ONNX file with quantized convolutions; weights are quantized per channel.

    The attention of the heads, the sums of branches and all resize operations stay in float32: they take little time,
    and quantizing them costs the most accuracy.

    Args:
        source: The float32 ONNX file.
        target: The file to write.
        inputs: Calibration inputs of the network; they determine the ranges of the activations.
    """
    import_optional("onnxruntime", "int8")
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:  # None ends the calibration
            x = next(inputs, None)
            return None if x is None else {"images": x}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # hides the advice to preprocess the model: the traced graph is already simplified
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
