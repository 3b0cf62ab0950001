"""Batch norm, sum and ReLU in Triton: interpreted on a CPU, compiled for GPUs, and where the network uses them.

Triton reads TRITON_INTERPRET when it is imported, so that what needs it runs in processes of its own.
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
        made = torch.Generator().manual_seed(sum(self.shape))
        channels = self.shape[1]
        x = (torch.randn(self.shape, generator=made) + self.mean).to(self.dtype)
        tensors = {
            "x": x.contiguous(memory_format=torch.channels_last) if self.channels_last else x,
            "weight": 1 + torch.randn(channels, generator=made) / 2,
            "bias": torch.randn(channels, generator=made),
            "running_mean": torch.randn(channels, generator=made),
            "running_var": 1 + torch.rand(channels, generator=made),
            "dy": torch.randn(self.shape, generator=made).to(self.dtype),
        }
        if self.add:
            tensors["add"] = torch.randn(self.shape, generator=made).to(self.dtype)
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


def plain(
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


def computed(function: Callable[..., Tensor], tensors: dict[str, Tensor], eps: float = EPS) -> dict[str, np.ndarray]:
    """The output, the running statistics and the gradients, as float64, which changes none of them."""
    learnt = [tensors[name].clone() for name in ("running_mean", "running_var")]
    inputs = {k: v.clone().requires_grad_() for k, v in tensors.items() if k in ("x", "weight", "bias", "add")}
    x, weight, bias, *add = inputs.values()
    y = function(x, weight, bias, *learnt, MOMENTUM, eps, *add)
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, list(inputs.values()), tensors["dy"])
    found = {"y": y, "running_mean": learnt[0], "running_var": learnt[1]}
    found |= {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: tensor.detach().double().numpy() for name, tensor in found.items()}


def truth(case: Case) -> dict[str, np.ndarray]:
    return computed(plain, {name: tensor.double() for name, tensor in case.tensors().items()})


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted))


@contextmanager
def process(folder, *, interpret: bool) -> Iterator[Callable]:
    """A process in which Triton interprets, or compiles; what is yielded calls a function there."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"INTERPRET": str(int(interpret)), "CACHE_DIR": str(folder)}.items():
            patch.setenv(f"TRITON_{name}", value)
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield lambda function, *given: pool.submit(function, *given).result()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    with process(tmp_path_factory.mktemp("cache"), interpret=True) as call:
        yield call


def fused(case: Case, programs: int | None = None) -> dict[str, np.ndarray]:
    """What the kernels compute, with a reduction by ``programs`` of them."""
    from ocrnet.engines.torch import fused_norm

    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.MonkeyPatch.context() as patch:
        if programs is not None:
            patch.setattr(fused_norm, "PROGRAMS", programs)
        return computed(fused_norm.batch_norm_relu, case.tensors())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_as_near_to_float64_as_pytorch_is(case, interpreted):
    found, wanted, theirs = interpreted(fused, case), truth(case), computed(plain, case.tensors())
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = np.linalg.norm(wanted[name])
        assert error(found[name], wanted[name]) <= 3 * error(theirs[name], wanted[name]) + 3e-7 * scale, name


@pytest.mark.parametrize("programs", [1, 3])
def test_parts_of_many_blocks_give_the_same(programs, interpreted):
    case = Case((2, 48, 13, 17), add=True)  # 7 blocks of rows
    found, wanted, whole = interpreted(fused, case, programs), truth(case), interpreted(fused, case)
    for name in wanted:
        assert error(found[name], wanted[name]) <= 1e-6 * np.linalg.norm(wanted[name]), name
    assert (found["dweight"] != whole["dweight"]).any()  # the parts were others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
def test_16_bits_are_rounded_once(dtype, add, interpreted):
    case = Case((2, 48, 9, 11), add=add, dtype=dtype)
    found, wanted, theirs = interpreted(fused, case), truth(case), computed(plain, case.tensors())
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds: a unit in the last place instead of half of one.
    units = 1.0 if dtype == torch.bfloat16 else 0.5
    assert (np.abs(found["y"] - wanted["y"]) <= units * torch.finfo(dtype).eps * np.abs(wanted["y"]) + 1e-6).all()
    for name in wanted:
        bound = 2.2 * units * error(theirs[name], wanted[name]) + 3e-7 * np.linalg.norm(wanted[name])
        assert error(found[name], wanted[name]) <= bound, name


def test_the_variance_of_large_numbers(interpreted):
    case = Case((2, 48, 13, 17), mean=1e3)
    found, wanted, theirs = interpreted(fused, case), truth(case), computed(plain, case.tensors())
    for name in wanted:
        bound = 3 * error(theirs[name], wanted[name]) + 3e-7 * np.linalg.norm(wanted[name])
        assert error(found[name], wanted[name]) <= bound, name
    x = case.tensors()["x"]
    naive = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()).double().numpy()
    exact = x.double().var((0, 2, 3), correction=0).numpy()
    learnt = case.tensors()["running_var"].double().numpy()
    mine = (found["running_var"] - (1 - MOMENTUM) * learnt) / MOMENTUM * (441 / 442)
    assert error(naive, exact) > 1e-2 * np.linalg.norm(exact)
    assert error(mine, exact) < 1e-5 * np.linalg.norm(exact)


def by_hand() -> dict[str, np.ndarray]:
    from ocrnet.engines.torch import fused_norm

    tensors = {
        "x": torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2),  # mean 3, variance 3.5, unbiased 14 / 3
        "weight": torch.tensor([2.0]),
        "bias": torch.tensor([1.5]),
        "running_mean": torch.tensor([1.0]),
        "running_var": torch.tensor([2.0]),
        "dy": torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 2, 2),
    }
    return computed(fused_norm.batch_norm_relu, tensors, eps=0.5)


def test_numbers_made_by_hand(interpreted):
    found = interpreted(by_hand)
    assert found["y"].ravel().tolist() == [0, 0.5, 1.5, 4.5]  # -1, -0.5, 0 and 1.5 times 2, plus 1.5
    assert found["running_mean"][0] == pytest.approx(0.9 + 0.1 * 3, rel=1e-7)
    assert found["running_var"][0] == pytest.approx(0.9 * 2 + 0.1 * 14 / 3, rel=1e-7)
    assert (found["dweight"][0], found["dbias"][0]) == (11, 14)  # of dy 0, 2, 4, 8
    wanted = [0 - 3.5 + 11 / 4, 2 - 3.5 + 11 / 8, 4 - 3.5, 8 - 3.5 - 1.5 * 11 / 4]  # times 2 / 2
    assert found["dx"].ravel().tolist() == wanted


@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
def test_repeats_are_bit_equal(add, interpreted):
    case = Case((2, 48, 13, 17), add=add, dtype=torch.bfloat16)
    once, again = interpreted(fused, case), interpreted(fused, case)
    assert all((once[name] == again[name]).all() for name in once)


def test_another_order_in_memory_changes_nothing(interpreted):
    case = Case((2, 18, 5, 7), add=True)
    found, wanted = interpreted(fused, case._replace(channels_last=False)), interpreted(fused, case)
    assert all((found[name] == wanted[name]).all() for name in wanted)


def hostile(name: str) -> list[np.ndarray]:
    """Where outputs and gradients are no numbers: by the kernels, and plainly."""
    from ocrnet.engines.torch import fused_norm

    tensors = Case((2, 18, 5, 7), add=True).tensors()
    tensors[name].view(-1)[:9] = float("nan")
    found = (computed(function, tensors) for function in (fused_norm.batch_norm_relu, plain))
    return [np.concatenate([np.isnan(array).ravel() for array in one.values()]) for one in found]


@pytest.mark.parametrize("name", ["weight", "add", "dy"])
def test_what_is_not_a_number_is_not_hidden(name, interpreted):
    mine, theirs = interpreted(hostile, name)
    assert mine.any()
    assert (mine == theirs).all()


def refused(x: tuple[int, ...], add: tuple[int, ...] | None) -> None:
    from ocrnet.engines.torch import fused_norm

    channels = [torch.zeros(x[1]) for _ in range(4)]
    fused_norm.batch_norm_relu(torch.zeros(x), *channels, MOMENTUM, EPS, None if add is None else torch.zeros(add))


def test_shapes_that_have_no_answer_are_refused(interpreted):
    with pytest.raises(ValueError, match="more than one value per channel"):
        interpreted(refused, (1, 8, 1, 1), None)
    with pytest.raises(ValueError, match=r"add has shape \(2, 8, 1, 3\)"):
        interpreted(refused, (2, 8, 3, 3), (2, 8, 1, 3))


def gradients_of_network(kernels: bool, dtype: torch.dtype) -> tuple[int, np.ndarray, np.ndarray]:
    """Calls of the kernels, gradients and running statistics of a small network's step."""
    calls = 0
    model = OCRNet(ARCH).train()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in architecture.init(ARCH, 0).items()})
    model = model.to(dtype, memory_format=torch.channels_last)
    if kernels:
        from ocrnet.engines.torch.fused_norm import batch_norm_relu

        def counted(*given):
            nonlocal calls
            calls += 1
            return batch_norm_relu(*given)

        for module in model.modules():
            if isinstance(module, Norm):
                module.fused = counted
    made = torch.Generator().manual_seed(1)
    aux, ocr = model(torch.randn(2, 3, 32, 64, generator=made).to(dtype, memory_format=torch.channels_last))
    (aux.square().mean() + ocr.square().mean()).backward()
    gradients = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    learnt = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
    return calls, gradients.numpy(), learnt.numpy()


def test_a_network_learns_the_same(interpreted):
    calls, *found = interpreted(gradients_of_network, True, torch.float32)
    _, *wanted = gradients_of_network(False, torch.float64)
    _, *theirs = gradients_of_network(False, torch.float32)
    model = OCRNet(ARCH)
    bare = [m for m in model.modules() if isinstance(m, ConvNorm) and not m.relu]
    assert calls == sum(isinstance(m, Norm) for m in model.modules()) - len(bare)
    for mine, other, exact in zip(found, theirs, wanted, strict=True):
        assert error(mine, exact) <= 3 * error(other, exact)


def launches(case: Case) -> list[tuple]:
    """The kernels with the arguments that a step gives them, none of which runs."""
    from ocrnet.engines.torch import fused_norm

    told: list[tuple] = []

    class Teller:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *given, **named: told.append((self.kernel, given, named))

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(fused_norm, name, Teller(getattr(fused_norm, name)))
        computed(fused_norm.batch_norm_relu, case.tensors())
    return told


def compiled(case: Case, capability: int) -> dict[str, str]:
    """PTX of each kernel, as Triton makes it at a launch: an integer of 1 is a constant, multiples of 16 are known."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    found = {}
    for kernel, given, named in launches(case):
        signature, constants, attributes = {}, {}, {}
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
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
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        found[kernel.__name__] = made.asm["ptx"]
    return found


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with process(tmp_path_factory.mktemp("cache"), interpret=False) as call:
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
def test_a_gpu_has_machine_code_of_them(case, capability, compiler):
    found = compiler(compiled, case, capability)
    assert found.keys() == set(KERNELS)
    for name, ptx in found.items():
        assert ".visible .entry" in ptx
        assert "atom." not in ptx
        assert "red.global" not in ptx
        if case.dtype == torch.bfloat16 and name.startswith("apply"):
            assert "cvt.rn.bf16" in ptx
        assert "max.f32" not in ptx  # which hides what is not a number; the interpreter's does not
        if case.shape[1] % 16 == 0 and not name.startswith("end"):
            assert "ld.global.v4" in ptx, name  # 16 bytes at a time


def test_norm_act_uses_it_in_training_and_with_relu_alone():
    told = []

    def noted(*given):
        told.append(given)
        return plain(*given)

    norm, x = Norm(3), torch.randn(2, 3, 4, 4)
    wanted = norm_act(norm, x, add=x)
    norm.running_mean.zero_(), norm.running_var.fill_(1)
    norm.fused = noted
    assert torch.equal(norm_act(norm, x, add=x), wanted)
    assert len(told) == 1
    norm_act(norm, x, slope=0.01)
    norm_act(norm.eval(), x)
    bare = ConvNorm(Conv(3, 3), relu=False).train()
    bare[1].fused = noted
    bare(x)
    assert len(told) == 1
    norm_act(norm.train(), x)
    assert len(told) == 2


def test_the_engine_gives_it_to_every_norm(monkeypatch):
    def given():
        cfg = Config(num_classes=5, device_target="CPU", fused_norm=True)
        opened = engine.TorchEngine(cfg, ARCH, world=World(), stream=object())
        return {module.fused for module in opened.model.modules() if isinstance(module, Norm)}

    assert given() == {None}
    monkeypatch.setitem(sys.modules, "ocrnet.engines.torch.fused_norm", SimpleNamespace(batch_norm_relu=plain))
    monkeypatch.setattr(engine, "fused_norm_unavailable_reason", lambda *_: None)
    assert given() == {plain}
