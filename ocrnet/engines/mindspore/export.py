"""A trained network as a MINDIR file, read back and compared before it gets its name."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ocrnet import checkpoint, spec
from ocrnet.engines.mindspore.engine import Logits
from ocrnet.engines.mindspore.ocr import OCRNet
from ocrnet.errors import OcrnetError
from ocrnet.weights.mindspore import canonical_name

TOLERANCE = 1e-5


def export(arch: spec.Arch, tensors: Mapping[str, np.ndarray], path: Path, size: tuple[int, int]) -> float:
    """Write normalised float32 1,3,H,W -> (aux, ocr) logits as MINDIR; return how far its answers are from ours.

    The difference is relative to the largest answer. OcrnetError where it exceeds 1e-5, and then nothing is left.
    """
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    network = OCRNet(arch)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(np.ascontiguousarray(tensors[canonical_name(parameter.name)], np.float32)))
    cell = Logits(network).set_train(False)
    x = Tensor(np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32))
    wanted = [head.asnumpy() for head in cell(x)]
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.mindir"
        ms.export(cell, x, file_name=str(draft), file_format="MINDIR")
        found = [head.asnumpy() for head in nn.GraphCell(ms.load(str(draft)))(x)]
        apart = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True))
        if not apart < TOLERANCE:
            raise OcrnetError(f"the exported network answers {apart:.1e} apart from this one; {path} was not written")
        checkpoint.replace(path, [draft.read_bytes()])
    return float(apart)
