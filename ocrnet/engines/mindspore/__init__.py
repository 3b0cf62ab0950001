"""The MindSpore engine: Ascend, CPU, and the GPUs that MindSpore still knows.

Importing it sets what MindSpore reads from the environment at its own import, so MindSpore must not be imported before.
"""

import os
import tempfile

import numpy as np

from ocrnet.engines.mindspore.interrupts import keep_interrupts
from ocrnet.utils.errors import OcrnetError

DEFAULTS = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # its oneDNN falls back to a reference convolution, 30 times slower, on AVX-512
    "GLOG_v": "3",  # errors alone
    "MS_OM_PATH": os.path.join(
        tempfile.gettempdir(), f"ocrnet-mindspore-{os.getuid()}"
    ),  # else into the working folder
}


def _prepare() -> None:
    if int(np.__version__.split(".")[0]) >= 2:
        raise OcrnetError(
            f"MindSpore needs NumPy below 2, {np.__version__} is installed: "
            "pip install 'numpy<2' 'opencv-python-headless<5'"
        )
    if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1":
        raise OcrnetError(
            "MS_COMPILER_CACHE_ENABLE is 1, but MindSpore's compile cache loads graphs of other settings, and so gives "
            "wrong numbers (docs/experiments.md): unset MS_COMPILER_CACHE_ENABLE"
        )
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # mutation: keep-sigint-from-mindspore
    keep_interrupts()


_prepare()
