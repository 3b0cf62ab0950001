"""Replaying a recorded training step gives the same results as running each step. A CPU recorder emulates a CUDA graph.

The recorder below records every operation of a step with the tensors that it reads and writes, and replays it on the
same memory. A number that Python computed during recording stays constant in every replay, as in a CUDA graph.
"""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import ARCH, CONFIG, MemoryStream
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocrnet import architecture
from ocrnet.config import Loss
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch.bilinear import retain_matrices
from ocrnet.engines.torch.cuda_graph import WARMUP
from ocrnet.engines.torch.engine import TorchEngine

STEPS = WARMUP + 5
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class OperationRecorder(TorchDispatchMode):
    """Records each operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class CpuRecorder:
    """Replays a step's operations. Recording executes them too, so the engine's tensors are restored afterwards."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.calls = engine, []

    def warm_up(self, work):
        return work()

    def record(self, work):
        mutable = [*self.engine.parameters.values(), self.engine.running, *self._momenta(), *self._scale()]
        before = [tensor.detach().clone() for tensor in mutable]
        with OperationRecorder() as recorded:
            results = work()
        with torch.no_grad():
            for tensor, old in zip(mutable, before, strict=True):
                tensor.copy_(old)
        self.calls = recorded.calls
        return results, self._replay

    def _momenta(self):
        return list(self.engine.optimizer.momentum.values())

    def _scale(self):
        return [self.engine.scaler.scale, self.engine.scaler.good_steps]

    @torch.no_grad()
    def _replay(self):
        for function, args, kwargs, recorded in self.calls:
            outputs = [leaf for leaf in tree_leaves(recorded) if isinstance(leaf, torch.Tensor)]
            inputs = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            if function.is_view or function is torch.ops.aten.detach.default:
                continue
            results = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for output, new in zip(outputs, results, strict=True):
                if output.data_ptr() not in inputs:  # an in-place operation has already written its result
                    output.copy_(new)


def open_engine(graph: bool, **changes):
    cfg = dataclasses.replace(CONFIG, **changes)
    engine = TorchEngine(cfg, ARCH, world=World(), stream=MemoryStream())
    engine.restore(architecture.init(ARCH, 1), 0)
    if not graph:
        return engine, None
    recorder = CpuRecorder(engine)
    engine.use_graph(recorder)
    return engine, recorder


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate_steps": 2}, {"clip_grad": 0.1}, {"warmup_step": 6}],
    ids=["plain", "micro-batches", "clipped", "warmup"],
)
def test_replaying_a_step_equals_running_it(changes):
    plain, _ = open_engine(False, **changes)
    graph, _ = open_engine(True, **changes)
    expected, actual = plain.train(STEPS), graph.train(STEPS)
    # In the graph the learning rate is a float32 on the device; without it, it is a Python double.
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-5)
    assert len({float(loss) for loss in actual.loss[:, 1]}) == STEPS
    state = plain.state()
    for name, array in graph.state().items():
        np.testing.assert_allclose(array, state[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("changes", [{}, {"loss": Loss(ohem=True), "clip_grad": 0.1, "accumulate_steps": 2}])
def test_a_step_never_synchronizes_with_the_device(changes):
    engine, recorder = open_engine(True, **changes)
    engine.train(WARMUP + 1)
    names = {function.name() for function, *_ in recorder.calls}
    assert len(recorder.calls) > 500
    assert not [name for name in names if any(part in name for part in SYNCHRONIZING)]


def test_the_graph_keeps_references_to_the_interpolation_matrices_that_it_reads():
    engine, _ = open_engine(True)
    plain, _ = open_engine(False)
    with retain_matrices() as used:
        plain.train(1)
    engine.train(WARMUP + 1)
    kept = {matrix.data_ptr() for matrix in engine.graph.matrices}
    assert used
    assert {matrix.data_ptr() for matrix in used} == kept


def test_a_replayed_step_that_is_not_finite_changes_nothing():
    engine, _ = open_engine(True)
    engine.train(WARMUP + 1)
    before = engine.state()
    bias = engine.parameters["cls_head.bias"]
    saved = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    stats = engine.train(1)
    assert not stats.finite.any()
    with torch.no_grad():
        bias.copy_(saved)
    for name, array in engine.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert engine.train(1).finite.all()
    assert not np.array_equal(engine.state()["conv1.weight"], before["conv1.weight"])


def test_the_graph_still_works_after_a_restore():
    engine, _ = open_engine(True)
    engine.train(WARMUP + 1)
    state, step = engine.state(), engine.step
    first = engine.train(2).loss
    engine.restore(state, step)
    np.testing.assert_array_equal(engine.train(2).loss, first)


def test_the_loss_scale_is_updated_within_the_graph():
    engine, _ = open_engine(True)
    engine.scaler.dynamic = True
    engine.scaler.scale.fill_(2.0**10)
    engine.train(WARMUP + 2)
    assert int(engine.scaler.good_steps) == WARMUP + 2
    engine.scaler.good_steps.fill_(1999)
    engine.train(1)
    assert (float(engine.scaler.scale), int(engine.scaler.good_steps)) == (2.0**11, 0)
