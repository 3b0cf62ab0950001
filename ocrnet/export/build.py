"""Write each export format: a draft to compare, a second file that outputs logits, and the file with its metadata."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.export.formats import BESIDE, DOCUMENT, SUFFIXES, Format, Input, Outputs, Precision
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
    """Writes one network in one format into ``folder``."""

    def __init__(self, spec: ExportSpec, found: Weights, folder: Path, calibration: Iterator[np.ndarray]) -> None:
        self.spec, self.found, self.folder, self.calibration = spec, found, folder, calibration

    def draft(self) -> tuple[Path, Path]:
        """Write the file without its metadata document, and a second file that outputs logits.

        Return both paths. They are equal if the first file outputs logits itself.
        """
        spec = self.spec
        answer, logits = (self.folder / f"{name}{SUFFIXES[spec.format]}" for name in ("answer", "logits"))
        if spec.format == "mindir":
            from ocrnet.engines.mindspore import export

            assert spec.size is not None
            export.write(self.found.arch, self.found.tensors, answer, spec.size)
            return answer, answer
        if spec.format in ("torchscript", "torch_export"):
            self._trace(answer, spec.outputs)
            if spec.outputs == "logits":
                return answer, answer
            self._trace(logits, "logits")
            return answer, logits
        graphs = self._onnx()
        for graph, path in zip(graphs, (answer, logits), strict=False):
            if spec.format == "openvino":
                self._openvino(graph, path, None)
            elif spec.format == "tensorrt":
                self._tensorrt(graph, path)
            else:
                graph.rename(path)
        return answer, logits if len(graphs) > 1 else answer

    def final(self, answer: Path, document: dict[str, Any]) -> list[Path]:
        """Write the draft again with its metadata document; return the files, last the one that users open."""
        spec, text = self.spec, json.dumps(document, allow_nan=False)
        path = self.folder / f"final{answer.suffix}"
        if spec.format == "onnx":
            onnx = import_optional("onnx", "--format onnx")
            model = onnx.load(str(answer))
            onnx.helper.set_model_props(model, {DOCUMENT: text})
            onnx.save(model, str(path))
        elif spec.format == "openvino":
            self._openvino(answer, path, text)
            return [path.with_suffix(".bin"), path]
        elif spec.format in ("torchscript", "torch_export"):
            from ocrnet.engines.torch import export

            export.add(answer, path, {f"{DOCUMENT}.json": text})
        else:
            answer.rename(path)
            beside = path.with_name(path.name + BESIDE)
            beside.write_text(text + "\n", encoding="utf-8")
            return [beside, path]
        return [path]

    def _portable(self) -> Any:
        from ocrnet.engines.torch.export import Portable

        spec = self.spec
        return Portable(self.found.arch, self.found.tensors, spec.mean, spec.std, spec.input)

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
        """Write ONNX with the requested outputs, and ONNX with logits, both from the same traced graph."""
        from ocrnet.engines.torch import export

        onnx = import_optional("onnx", f"--format {self.spec.format}")
        network, both = self._portable(), self.folder / "both.onnx"
        network.outputs = tuple(dict.fromkeys((self.spec.outputs, "logits")))
        export.write_onnx(network, both, self.spec.size)
        if self.spec.precision == "int8":
            eight = self.folder / "eight.onnx"
            quantize(both, eight, self.calibration)
            both = eight
        graphs = []
        for name in network.outputs:
            model = onnx.load(str(both))
            kept = [output for output in model.graph.output if output.name == name]
            del model.graph.output[:]
            model.graph.output.extend(kept)
            model.producer_name = "ocrnet"
            graphs.append(self.folder / f"{name}_alone.onnx")
            onnx.save(model, str(graphs[-1]))
        return graphs

    def _openvino(self, source: Path, path: Path, text: str | None) -> None:
        ov = import_optional("openvino", "--format openvino")
        model = ov.Core().read_model(source)
        if text is not None:
            model.set_rt_info(text, DOCUMENT)
        ov.save_model(model, path, compress_to_fp16=self.spec.precision == "float16")

    def _tensorrt(self, source: Path, path: Path) -> None:
        """Build a TensorRT plan for this machine's GPU; this code has never run, because no GPU was available."""
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
