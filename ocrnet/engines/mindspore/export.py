"""Export of a trained network to a MINDIR file."""

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
@translate_oom("give a smaller --size")
def write(arch: architecture.Arch, tensors: Mapping[str, np.ndarray], path: Path, size: tuple[int, int]) -> None:
    """Write the network from normalized float32 1,3,H,W to (aux, ocr) logits as MINDIR.

    Args:
        arch: The architecture of the network.
        tensors: The weights and batch-norm statistics under canonical names.
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
