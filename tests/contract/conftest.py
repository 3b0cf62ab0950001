"""One behavior suite, run once for each engine.

MindSpore runs op by op here, because compiling takes seconds per engine. Tests marked `compiled` also run in graph
mode, with ``only=True`` only in graph mode, and with ``long=True`` in graph mode only in `make test-long`.
"""

import dataclasses
import os
from collections.abc import Callable

import pytest
from tiny import ARCH, CONFIG, MemoryStream

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Optimizer
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Engine
from ocrnet.engines.factory import open_engine


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "compiled(only=False, long=False): run MindSpore in graph mode too, or only in it"
    )


def pytest_generate_tests(metafunc):
    if "make_engine" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("compiled")
        modes = [] if marker is not None and marker.kwargs.get("only") else ["pynative"]
        if marker is not None and (os.environ.get("OCRNET_TEST_LONG") or not marker.kwargs.get("long")):
            modes.append("graph")
        engines = ["torch"] + [pytest.param(f"mindspore-{mode}", marks=pytest.mark.mindspore) for mode in modes]
        metafunc.parametrize("make_engine", engines, indirect=True)


@pytest.fixture
def make_engine(request) -> Callable[..., Engine]:
    """Return a function that opens a small engine, given a stream and config keys, by default with fresh weights."""
    name, _, mode = request.param.partition("-")

    def make(stream: MemoryStream | None = None, *, fresh: bool = True, arch: Arch = ARCH, **changes) -> Engine:
        if "weight_decay" in changes or "decay" in changes or "momentum" in changes:
            names = ("weight_decay", "decay", "momentum", "nesterov")
            changes["optimizer"] = Optimizer(**{n: changes.pop(n) for n in names if n in changes})
        cfg = dataclasses.replace(CONFIG, engine=name, ms_mode=mode or "graph", **changes)
        engine = open_engine(cfg, arch, world=World(), stream=stream)
        if fresh:
            engine.restore(architecture.init(arch, 1), 0)
        return engine

    return make
