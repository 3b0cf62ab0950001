"""Writing of each export format: a draft for the comparison, a draft that outputs logits, and the final file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.export.formats import DOCUMENT, SIDECAR_SUFFIX, SUFFIXES, Format, Input, Outputs, Precision
from ocrnet.export.quantize import quantize
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional
from ocrnet.weights import Weights


@dataclass(frozen=True)
class ExportSpec:
    """Settings of one export; ``size`` is (height, width), or None for any size."""

    format: Format
    precision: Precision
    input: Input
    outputs: Outputs
    size: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Exporter:
    """Writes one network in one format into ``folder``; ``calibration`` yields inputs for int8 quantization."""

    def __init__(self, spec: ExportSpec, weights: Weights, folder: Path, calibration: Iterator[np.ndarray]) -> None:
        self.spec, self.weights, self.folder, self.calibration = spec, weights, folder, calibration

    def draft(self) -> tuple[Path, Path]:
        """Write the file without its metadata document, and a second file that outputs logits.

        Return both paths; they are equal if the first file outputs logits.
        """
        spec = self.spec
        output, logits = (self.folder / f"{name}{SUFFIXES[spec.format]}" for name in ("output", "logits"))
        if spec.format == "mindir":
            from ocrnet.engines.mindspore import export

            assert spec.size is not None
            export.write(self.weights.arch, self.weights.tensors, output, spec.size)
            return output, output
        if spec.format in ("torchscript", "torch_export"):
            self._trace(output, spec.outputs)
            if spec.outputs == "logits":
                return output, output
            self._trace(logits, "logits")
            return output, logits
        graphs = self._onnx()
        for graph, path in zip(graphs, (output, logits), strict=False):
            if spec.format == "openvino":
                self._openvino(graph, path, None)
            elif spec.format == "tensorrt":
                self._tensorrt(graph, path)
            else:
                graph.rename(path)
        return output, logits if len(graphs) > 1 else output

    def final(self, output: Path, document: dict[str, Any]) -> list[Path]:
        """Write the draft with its metadata document; return the files of the export, with the main file last."""
        spec, text = self.spec, json.dumps(document, allow_nan=False)
        path = self.folder / f"final{output.suffix}"
        if spec.format == "onnx":
            onnx = import_optional("onnx", "--format onnx")
            model = onnx.load(str(output))
            onnx.helper.set_model_props(model, {DOCUMENT: text})
            onnx.save(model, str(path))
        elif spec.format == "openvino":
            self._openvino(output, path, text)
            return [path.with_suffix(".bin"), path]
        elif spec.format in ("torchscript", "torch_export"):
            from ocrnet.engines.torch import export

            export.add(output, path, {f"{DOCUMENT}.json": text})
        else:
            output.rename(path)
            sidecar = path.with_name(path.name + SIDECAR_SUFFIX)
            sidecar.write_text(text + "\n", encoding="utf-8")
            return [sidecar, path]
        return [path]

    def _portable(self) -> Any:
        from ocrnet.engines.torch.export import Portable

        spec = self.spec
        return Portable(self.weights.arch, self.weights.tensors, spec.mean, spec.std, spec.input)

    def _trace(self, path: Path, outputs: Outputs) -> None:
        from ocrnet.engines.torch import export

        network = self._portable()
        network.outputs = (outputs,)
        if self.spec.format == "torchscript":
            export.write_torchscript(network, path, self.spec.size)
        else:
            assert self.spec.size is not None
            export.write_torch_export(network, path, self.spec.size)

    def _onnx(self) -> list[Path]:
        """Write ONNX with the requested outputs, and ONNX with logits, both from one traced graph."""
        from ocrnet.engines.torch import export

        onnx = import_optional("onnx", f"--format {self.spec.format}")
        network, traced = self._portable(), self.folder / "traced.onnx"
        network.outputs = tuple(dict.fromkeys((self.spec.outputs, "logits")))
        export.write_onnx(network, traced, self.spec.size)
        if self.spec.precision == "int8":
            quantized = self.folder / "quantized.onnx"
            quantize(traced, quantized, self.calibration)
            traced = quantized
        graphs = []
        for name in network.outputs:
            model = onnx.load(str(traced))
            outputs = [output for output in model.graph.output if output.name == name]
            del model.graph.output[:]
            model.graph.output.extend(outputs)
            model.producer_name = "ocrnet"
            graphs.append(self.folder / f"{name}_only.onnx")
            onnx.save(model, str(graphs[-1]))
        return graphs

    def _openvino(self, source: Path, path: Path, text: str | None) -> None:
        ov = import_optional("openvino", "--format openvino")
        model = ov.Core().read_model(source)
        if text is not None:
            model.set_rt_info(text, DOCUMENT)
        ov.save_model(model, path, compress_to_fp16=self.spec.precision == "float16")

    def _tensorrt(self, source: Path, path: Path) -> None:
        """Build a TensorRT plan for the GPU of this machine. This code is untested, because no GPU was available."""
        trt = import_optional("tensorrt", "--format tensorrt")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(source)):
            raise OcrnetError(f"TensorRT {trt.__version__} does not support the network: {parser.get_error(0)}")
        config = builder.create_builder_config()
        if self.spec.precision == "float16":
            config.set_flag(trt.BuilderFlag.FP16)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise OcrnetError(f"TensorRT {trt.__version__} could not build the network; see its messages above")
        path.write_bytes(bytes(plan))
