"""What MindSpore reads at its import is set once here; these tests run in processes of their own.

One variable (ONEDNN_MAX_CPU_ISA) is PyTorch's too: where it is set, PyTorch is slower and rounds otherwise.
"""

import ocrnet.engines.mindspore  # noqa: F401


def pytest_itemcollected(item):
    item.add_marker("mindspore")
