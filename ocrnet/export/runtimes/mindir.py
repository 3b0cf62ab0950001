"""The session for MINDIR files in MindSpore on a CPU; their metadata is in NAME.mindir.json in the same folder."""

import json
from pathlib import Path

import numpy as np

from ocrnet.export.formats import SIDECAR_SUFFIX
from ocrnet.utils.installed import import_optional


class MindIRSession:
    """A MINDIR file; see `ocrnet.export.formats.Session`."""

    def __init__(self, path: Path) -> None:
        from ocrnet.engines.mindspore.interrupts import defer_interrupts  # must precede the import of MindSpore

        ms = import_optional("mindspore", f"running {path}")
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
        sidecar = path.with_name(path.name + SIDECAR_SUFFIX)
        self.document = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
        self.defer_interrupts = defer_interrupts
        with defer_interrupts():
            self.tensor, self.graph = ms.Tensor, ms.nn.GraphCell(ms.load(str(path)))
        self.runtime, self.notes = f"mindspore {ms.__version__}", ["device: CPU"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the OCR head's logits, the second output."""
        with self.defer_interrupts():
            return self.graph(self.tensor(x))[1].asnumpy()
