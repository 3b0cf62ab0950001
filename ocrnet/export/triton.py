"""`ocrnet export --format triton`: write an ONNX export as a model of an NVIDIA Triton repository."""

import dataclasses
from typing import Any

from ocrnet.data.datasets import Dataset
from ocrnet.export.card import card_path
from ocrnet.export.compare import Comparison
from ocrnet.export.exporter import ExportOptions, export
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import import_optional
from ocrnet.weights import checkpoint

FORMAT = "triton"
MAX_BATCH = 8
QUEUE_MICROSECONDS = 5000
# The ONNX element types of the graph's input and output, with their names in Triton.
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8"}


def export_repository(options: ExportOptions, labeled: Dataset | None) -> Comparison:
    """Write OUTPUT/config.pbtxt, OUTPUT/1/model.onnx and OUTPUT/MODEL_CARD.md.

    If no size is set, batch size, height and width are dynamic, and Triton batches requests of the same size.

    Args:
        options: The command-line options; ``options.output`` is OUTPUT.
        labeled: The labeled dataset for the comparison, as in `export`.

    Returns:
        The comparison of the exported file with the checkpoint.

    Raises:
        OcrnetError: OUTPUT exists and is neither an empty folder nor a Triton model, or `export` fails.
    """
    folder, config = options.output, options.output / "config.pbtxt"
    if folder.exists() and not (folder.is_dir() and (config.is_file() or not any(folder.iterdir()))):
        raise OcrnetError(f"--output {folder} exists and is not a model of a Triton repository; choose a new folder")
    onnx = import_optional("onnx", "--format triton")
    model = folder / "1" / "model.onnx"
    dynamic = options.dynamic or options.size is None
    comparison = export(dataclasses.replace(options, format="onnx", output=model, dynamic=dynamic), labeled)
    card_path(model).replace(folder / "MODEL_CARD.md")
    text = describe(onnx.load(str(model), load_external_data=False).graph)
    checkpoint.replace(config, [text.encode()], flag="--output")
    return comparison


def describe(graph: Any) -> str:
    """Return the config.pbtxt of an ONNX graph; it has no name, because Triton uses the folder's."""
    (graph_input,), (graph_output,) = graph.input, graph.output
    batched = not graph_input.type.tensor_type.shape.dim[0].HasField("dim_value")
    lines = ['backend: "onnxruntime"', f"max_batch_size: {MAX_BATCH if batched else 0}"]
    for kind, value in (("input", graph_input), ("output", graph_output)):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        lines += [
            f"{kind} [",
            "  {",
            f'    name: "{value.name}"',
            f"    data_type: {TYPES[tensor.elem_type]}",
            f"    dims: {sizes[1:] if batched else sizes}",
            "  }",
            "]",
        ]
    if batched:
        lines += ["dynamic_batching {", f"  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}", "}"]
    return "\n".join(lines) + "\n"
