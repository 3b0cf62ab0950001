"""One behaviour suite, run once for each engine."""

import dataclasses
from collections.abc import Callable

import pytest
from tiny import ARCH, CONFIG, MemoryStream

from ocrnet import spec
from ocrnet.config import Optimizer
from ocrnet.engine import Engine
from ocrnet.spec import Arch
from ocrnet.world import World

ENGINES = ("torch",)


@pytest.fixture(params=ENGINES)
def make_engine(request) -> Callable[..., Engine]:
    """Return a function that opens a small engine with fresh weights: keys of the config, and the stream."""

    def make(stream: MemoryStream | None = None, *, fresh: bool = True, arch: Arch = ARCH, **changes) -> Engine:
        if request.param == "torch":
            from ocrnet.engines.torch.engine import TorchEngine as Chosen
        if "weight_decay" in changes or "decay" in changes or "momentum" in changes:
            names = ("weight_decay", "decay", "momentum", "nesterov")
            changes["optimizer"] = Optimizer(**{n: changes.pop(n) for n in names if n in changes})
        cfg = dataclasses.replace(CONFIG, engine=request.param, **changes)
        engine = Chosen(cfg, arch, world=World(), stream=stream)
        if fresh:
            engine.restore(spec.init(arch, 1), 0)
        return engine

    return make
