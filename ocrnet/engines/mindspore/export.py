"""Export a trained network as a MindIR file."""

from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ocrnet import architecture
from ocrnet.engines.mindspore.device import translate_oom
from ocrnet.engines.mindspore.engine import Logits
from ocrnet.engines.mindspore.interrupts import defer_interrupts
from ocrnet.engines.mindspore.ocr import OCRNet
from ocrnet.weights.mindspore import canonical_name


@defer_interrupts()
@translate_oom("use a smaller --size")
def write(arch: architecture.Arch, tensors: Mapping[str, np.ndarray], path: Path, size: tuple[int, int]) -> None:
    """Write a MindIR file whose input is normalized float32 1,3,H,W and whose outputs are the (aux, ocr) logits.

    Args:
        arch: The architecture of the network.
        tensors: The weights and batch norm statistics by canonical name.
        path: The file to write.
        size: Height and width of the input.

    Raises:
        OcrnetError: Memory is exhausted.
    """
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    network = OCRNet(arch)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(np.ascontiguousarray(tensors[canonical_name(parameter.name)], np.float32)))
    x = Tensor(np.zeros((1, 3, *size), np.float32))
    ms.export(Logits(network).set_train(False), x, file_name=str(path), file_format="MINDIR")
