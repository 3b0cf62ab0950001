"""The MindSpore engine for Ascend NPUs, CPUs, and the GPUs that MindSpore supports.

Importing this package sets environment variables that MindSpore reads when it is imported. Import this package before
MindSpore.
"""

import os
import tempfile

import numpy as np

from ocrnet.engines.mindspore.interrupts import install_interrupt_handling
from ocrnet.utils.errors import OcrnetError

DEFAULTS = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # on AVX-512, oneDNN falls back to a reference convolution, 30 times slower
    "GLOG_v": "3",  # errors only
    "MS_OM_PATH": os.path.join(
        tempfile.gettempdir(), f"ocrnet-mindspore-{os.getuid()}"
    ),  # MindSpore's default is the working directory
}


def _prepare() -> None:
    if int(np.__version__.split(".")[0]) >= 2:
        raise OcrnetError(
            f"MindSpore needs NumPy below 2, but {np.__version__} is installed: "
            "pip install 'numpy<2' 'opencv-python-headless<5'"
        )
    if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1":
        raise OcrnetError(
            "MS_COMPILER_CACHE_ENABLE is 1, but MindSpore's compile cache can load graphs of other settings, which "
            "gives wrong results (docs/experiments.md): unset MS_COMPILER_CACHE_ENABLE"
        )
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # mutation: keep-sigint-from-mindspore
    install_interrupt_handling()


_prepare()
