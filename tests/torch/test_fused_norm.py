"""Triton kernels of batch norm, sum and ReLU: interpreted on a CPU, compiled for GPUs, and used by the network.

Triton reads TRITON_INTERPRET when it is imported, so these tests run the kernels in separate processes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ocrnet import architecture
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines.torch import engine
from ocrnet.engines.torch.hrnet import Conv, ConvNorm, Norm, norm_act
from ocrnet.engines.torch.ocr import OCRNet

KERNELS = ("moments", "end_moments", "apply", "reduce_gradient", "end_gradient", "apply_gradient")
ARCH = architecture.Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
MOMENTUM, EPS = 0.1, 1e-5


class Case(NamedTuple):
    """A batch N,C,H,W around ``mean``, with standard deviation 1."""

    shape: tuple[int, int, int, int]
    add: bool = False
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    channels_last: bool = True

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.shape))
        channels = self.shape[1]
        x = (torch.randn(self.shape, generator=generator) + self.mean).to(self.dtype)
        tensors = {
            "x": x.contiguous(memory_format=torch.channels_last) if self.channels_last else x,
            "weight": 1 + torch.randn(channels, generator=generator) / 2,
            "bias": torch.randn(channels, generator=generator),
            "running_mean": torch.randn(channels, generator=generator),
            "running_var": 1 + torch.rand(channels, generator=generator),
            "dy": torch.randn(self.shape, generator=generator).to(self.dtype),
        }
        if self.add:
            tensors["add"] = torch.randn(self.shape, generator=generator).to(self.dtype)
        return tensors


CASES = [
    Case((2, 48, 13, 17)),
    Case((2, 48, 13, 17), add=True),
    Case((1, 96, 5, 7), mean=3.0),
    Case((2, 96, 5, 7), add=True),
    Case((1, 18, 3, 3), add=True),
    Case((2, 18, 67, 9)),
    Case((2, 720, 2, 3), add=True),
    Case((1, 1, 3, 1)),
    Case((2, 48, 1, 1), add=True),
]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    add: Tensor | None = None,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.relu(y if add is None else y + add)


def compute(function: Callable[..., Tensor], tensors: dict[str, Tensor], eps: float = EPS) -> dict[str, np.ndarray]:
    """Return output, running statistics and gradients, converted to float64 (which is exact)."""
    running = [tensors[name].clone() for name in ("running_mean", "running_var")]
    inputs = {k: v.clone().requires_grad_() for k, v in tensors.items() if k in ("x", "weight", "bias", "add")}
    x, weight, bias, *add = inputs.values()
    y = function(x, weight, bias, *running, MOMENTUM, eps, *add)
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, list(inputs.values()), tensors["dy"])
    results = {"y": y, "running_mean": running[0], "running_var": running[1]}
    results |= {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: tensor.detach().double().numpy() for name, tensor in results.items()}


def float64_reference(case: Case) -> dict[str, np.ndarray]:
    return compute(reference, {name: tensor.double() for name, tensor in case.tensors().items()})


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected))


@contextmanager
def triton_process(folder, *, interpret: bool) -> Iterator[Callable]:
    """Start a process in which Triton interprets or compiles; yield a function that calls a function in it."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"INTERPRET": str(int(interpret)), "CACHE_DIR": str(folder)}.items():
            patch.setenv(f"TRITON_{name}", value)
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    with triton_process(tmp_path_factory.mktemp("cache"), interpret=True) as call:
        yield call


def fused(case: Case, programs: int | None = None) -> dict[str, np.ndarray]:
    """Return what the kernels compute; ``programs`` is the number of Triton programs of a reduction."""
    from ocrnet.engines.torch import fused_norm

    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.MonkeyPatch.context() as patch:
        if programs is not None:
            patch.setattr(fused_norm, "PROGRAMS", programs)
        return compute(fused_norm.batch_norm_relu, case.tensors())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_float32_error_is_at_most_three_times_that_of_pytorch(case, interpreted):
    found, expected, theirs = interpreted(fused, case), float64_reference(case), compute(reference, case.tensors())
    assert found.keys() == expected.keys()
    for name in expected:
        scale = np.linalg.norm(expected[name])
        assert error(found[name], expected[name]) <= 3 * error(theirs[name], expected[name]) + 3e-7 * scale, name


@pytest.mark.parametrize("programs", [1, 3])
def test_the_number_of_programs_changes_results_only_by_rounding(programs, interpreted):
    case = Case((2, 48, 13, 17), add=True)  # 7 blocks of rows
    found, expected, whole = interpreted(fused, case, programs), float64_reference(case), interpreted(fused, case)
    for name in expected:
        assert error(found[name], expected[name]) <= 1e-6 * np.linalg.norm(expected[name]), name
    assert (found["dweight"] != whole["dweight"]).any()  # the partial sums were grouped differently


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
def test_16_bit_outputs_are_rounded_once(dtype, add, interpreted):
    case = Case((2, 48, 9, 11), add=add, dtype=dtype)
    found, expected, theirs = interpreted(fused, case), float64_reference(case), compute(reference, case.tensors())
    # Triton's interpreter truncates to bfloat16 where a GPU rounds: the error is up to 1 unit in the last place.
    units = 1.0 if dtype == torch.bfloat16 else 0.5
    assert (np.abs(found["y"] - expected["y"]) <= units * torch.finfo(dtype).eps * np.abs(expected["y"]) + 1e-6).all()
    for name in expected:
        bound = 2.2 * units * error(theirs[name], expected[name]) + 3e-7 * np.linalg.norm(expected[name])
        assert error(found[name], expected[name]) <= bound, name


def test_the_variance_is_accurate_when_the_mean_is_large(interpreted):
    case = Case((2, 48, 13, 17), mean=1e3)
    found, expected, theirs = interpreted(fused, case), float64_reference(case), compute(reference, case.tensors())
    for name in expected:
        bound = 3 * error(theirs[name], expected[name]) + 3e-7 * np.linalg.norm(expected[name])
        assert error(found[name], expected[name]) <= bound, name
    x = case.tensors()["x"]
    naive = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()).double().numpy()
    exact = x.double().var((0, 2, 3), correction=0).numpy()
    running = case.tensors()["running_var"].double().numpy()
    ours = (found["running_var"] - (1 - MOMENTUM) * running) / MOMENTUM * (441 / 442)
    assert error(naive, exact) > 1e-2 * np.linalg.norm(exact)
    assert error(ours, exact) < 1e-5 * np.linalg.norm(exact)


def hand_computed_example() -> dict[str, np.ndarray]:
    from ocrnet.engines.torch import fused_norm

    tensors = {
        "x": torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2),  # mean 3, variance 3.5, unbiased 14 / 3
        "weight": torch.tensor([2.0]),
        "bias": torch.tensor([1.5]),
        "running_mean": torch.tensor([1.0]),
        "running_var": torch.tensor([2.0]),
        "dy": torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 2, 2),
    }
    return compute(fused_norm.batch_norm_relu, tensors, eps=0.5)


def test_a_small_example_computed_by_hand(interpreted):
    found = interpreted(hand_computed_example)
    assert found["y"].ravel().tolist() == [0, 0.5, 1.5, 4.5]  # -1, -0.5, 0 and 1.5 times 2, plus 1.5
    assert found["running_mean"][0] == pytest.approx(0.9 + 0.1 * 3, rel=1e-7)
    assert found["running_var"][0] == pytest.approx(0.9 * 2 + 0.1 * 14 / 3, rel=1e-7)
    assert (found["dweight"][0], found["dbias"][0]) == (11, 14)  # of dy 0, 2, 4, 8
    expected = [0 - 3.5 + 11 / 4, 2 - 3.5 + 11 / 8, 4 - 3.5, 8 - 3.5 - 1.5 * 11 / 4]  # times 2 / 2
    assert found["dx"].ravel().tolist() == expected


@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
def test_repeated_calls_are_bit_equal(add, interpreted):
    case = Case((2, 48, 13, 17), add=add, dtype=torch.bfloat16)
    once, again = interpreted(fused, case), interpreted(fused, case)
    assert all((once[name] == again[name]).all() for name in once)


def test_the_memory_format_changes_nothing(interpreted):
    case = Case((2, 18, 5, 7), add=True)
    found, expected = interpreted(fused, case._replace(channels_last=False)), interpreted(fused, case)
    assert all((found[name] == expected[name]).all() for name in expected)


def nan_positions(name: str) -> list[np.ndarray]:
    """Return where outputs and gradients are NaN if an input has NaNs: with the kernels, and with the reference."""
    from ocrnet.engines.torch import fused_norm

    tensors = Case((2, 18, 5, 7), add=True).tensors()
    tensors[name].view(-1)[:9] = float("nan")
    found = (compute(function, tensors) for function in (fused_norm.batch_norm_relu, reference))
    return [np.concatenate([np.isnan(array).ravel() for array in one.values()]) for one in found]


@pytest.mark.parametrize("name", ["weight", "add", "dy"])
def test_nan_inputs_give_nan_outputs(name, interpreted):
    ours, theirs = interpreted(nan_positions, name)
    assert ours.any()
    assert (ours == theirs).all()


def normalize_shapes(x: tuple[int, ...], add: tuple[int, ...] | None) -> None:
    from ocrnet.engines.torch import fused_norm

    channels = [torch.zeros(x[1]) for _ in range(4)]
    fused_norm.batch_norm_relu(torch.zeros(x), *channels, MOMENTUM, EPS, None if add is None else torch.zeros(add))


def test_invalid_shapes_are_rejected(interpreted):
    with pytest.raises(ValueError, match="more than one value per channel"):
        interpreted(normalize_shapes, (1, 8, 1, 1), None)
    with pytest.raises(ValueError, match=r"add has shape \(2, 8, 1, 3\)"):
        interpreted(normalize_shapes, (2, 8, 3, 3), (2, 8, 1, 3))


def gradients_of_network(kernels: bool, dtype: torch.dtype) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the number of kernel calls, the gradients and the running statistics of a step of a small network."""
    calls = 0
    model = OCRNet(ARCH).train()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in architecture.init(ARCH, 0).items()})
    model = model.to(dtype, memory_format=torch.channels_last)
    if kernels:
        from ocrnet.engines.torch.fused_norm import batch_norm_relu

        def counted(*arguments):
            nonlocal calls
            calls += 1
            return batch_norm_relu(*arguments)

        for module in model.modules():
            if isinstance(module, Norm):
                module.fused = counted
    generator = torch.Generator().manual_seed(1)
    aux, ocr = model(torch.randn(2, 3, 32, 64, generator=generator).to(dtype, memory_format=torch.channels_last))
    (aux.square().mean() + ocr.square().mean()).backward()
    gradients = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    running = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
    return calls, gradients.numpy(), running.numpy()


def test_a_network_has_the_same_gradients_and_statistics(interpreted):
    calls, *found = interpreted(gradients_of_network, True, torch.float32)
    _, *expected = gradients_of_network(False, torch.float64)
    _, *theirs = gradients_of_network(False, torch.float32)
    model = OCRNet(ARCH)
    bare = [m for m in model.modules() if isinstance(m, ConvNorm) and not m.relu]
    assert calls == sum(isinstance(m, Norm) for m in model.modules()) - len(bare)
    for ours, other, exact in zip(found, theirs, expected, strict=True):
        assert error(ours, exact) <= 3 * error(other, exact)


def launches(case: Case) -> list[tuple]:
    """Return the kernels that one step launches, with their arguments, without running them."""
    from ocrnet.engines.torch import fused_norm

    recorded: list[tuple] = []

    class LaunchRecorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **named: recorded.append((self.kernel, arguments, named))

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(fused_norm, name, LaunchRecorder(getattr(fused_norm, name)))
        compute(fused_norm.batch_norm_relu, case.tensors())
    return recorded


def compiled(case: Case, capability: int) -> dict[str, str]:
    """Return each kernel's PTX, specialized as at a launch: an integer 1 is a constant, multiples of 16 are marked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    ptx = {}
    for kernel, arguments, named in launches(case):
        signature, constants, attributes = {}, {}, {}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = (
                types[value.dtype] if isinstance(value, Tensor) else {int: "i32", float: "fp32"}[type(value)]
            )
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": named.get("num_warps", 4)}
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.asm["cubin"]
        ptx[kernel.__name__] = binary.asm["ptx"]
    return ptx


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with triton_process(tmp_path_factory.mktemp("cache"), interpret=False) as call:
        yield call


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (Case((2, 48, 128, 256), dtype=torch.bfloat16), 90),
        (Case((2, 48, 128, 256), add=True, dtype=torch.bfloat16), 80),
        (Case((1, 18, 1, 2), add=True, dtype=torch.float16), 75),
    ],
    ids=str,
)
def test_the_kernels_compile_for_gpus(case, capability, compiler):
    found = compiler(compiled, case, capability)
    assert found.keys() == set(KERNELS)
    for name, ptx in found.items():
        assert ".visible .entry" in ptx
        assert "atom." not in ptx
        assert "red.global" not in ptx
        if case.dtype == torch.bfloat16 and name.startswith("apply"):
            assert "cvt.rn.bf16" in ptx
        assert "max.f32" not in ptx  # which turns NaN into 0, unlike the interpreter's max in the tests above
        if case.shape[1] % 16 == 0 and not name.startswith("end"):
            assert "ld.global.v4" in ptx, name  # 16 bytes at a time


def test_norm_act_uses_the_kernels_only_in_training_and_only_with_relu():
    calls = []

    def recorded(*arguments):
        calls.append(arguments)
        return reference(*arguments)

    norm, x = Norm(3), torch.randn(2, 3, 4, 4)
    expected = norm_act(norm, x, add=x)
    norm.running_mean.zero_(), norm.running_var.fill_(1)
    norm.fused = recorded
    assert torch.equal(norm_act(norm, x, add=x), expected)
    assert len(calls) == 1
    norm_act(norm, x, slope=0.01)
    norm_act(norm.eval(), x)
    bare = ConvNorm(Conv(3, 3), relu=False).train()
    bare[1].fused = recorded
    bare(x)
    assert len(calls) == 1
    norm_act(norm.train(), x)
    assert len(calls) == 2


def test_the_engine_sets_the_kernels_on_every_norm(monkeypatch):
    def fused_functions():
        cfg = Config(num_classes=5, device_target="CPU", fused_norm=True)
        opened = engine.TorchEngine(cfg, ARCH, world=World(), stream=object())
        return {module.fused for module in opened.model.modules() if isinstance(module, Norm)}

    assert fused_functions() == {None}
    monkeypatch.setitem(sys.modules, "ocrnet.engines.torch.fused_norm", SimpleNamespace(batch_norm_relu=reference))
    monkeypatch.setattr(engine, "fused_norm_unavailable_reason", lambda *_: None)
    assert fused_functions() == {reference}
