"""Import the MindSpore engine first, which sets the environment variables that MindSpore reads at import.

These tests run in processes of their own, because one variable (ONEDNN_MAX_CPU_ISA) also affects PyTorch: it makes
PyTorch slower and changes its rounding.
"""

import ocrnet.engines.mindspore  # noqa: F401


def pytest_itemcollected(item):
    item.add_marker("mindspore")
