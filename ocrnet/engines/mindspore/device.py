"""Choice of the device and the precision, and the log lines that describe them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import mindspore as ms

from ocrnet.config import Config
from ocrnet.engines.mindspore import DEFAULTS
from ocrnet.engines.mindspore.stderr import discard_stderr
from ocrnet.utils.errors import OcrnetError

ISA = "ONEDNN_MAX_CPU_ISA"
OUT_OF_MEMORY = ("out of memory", "memory isn't enough", "memory is not enough", "allocate", "bad_alloc", "malloc")

MISSING = {
    "GPU": (
        "device_target GPU: MindSpore {version} sees no GPU that it can use; its builds require CUDA 11.1 or 11.6 "
        "with cuDNN 8 and a compute capability of at most 8.6; on NVIDIA GPUs use --engine torch"
    ),
    "Ascend": (
        "device_target Ascend: MindSpore {version} finds no Ascend; install the driver and the CANN toolkit of this "
        "MindSpore version and source its set_env.sh, or use --device_target CPU"
    ),
}


@dataclass(frozen=True)
class Precision:
    """The AMP level, whether the loss is scaled, and ``text``, which describes both in the log, with the reason."""

    level: str
    scaled: bool
    text: str


def choose_device(target: str | None) -> tuple[str, str]:
    """Return MindSpore's device target for ``--device_target`` and its description for the log.

    Raise `OcrnetError` if MindSpore cannot use the requested device.
    """
    if target is None:
        device = next((name for name in ("Ascend", "GPU") if _available(name)), "CPU")
        return device, device if device != "CPU" else "CPU, because MindSpore sees neither Ascend nor GPU"
    if target != "CPU" and not _available(target):
        raise OcrnetError(MISSING[target].format(version=ms.__version__))
    return target, target


def _available(name: str) -> bool:
    verbose = os.environ["GLOG_v"] < "3"  # noqa: SIM112 - MindSpore spells it so
    with contextlib.nullcontext() if verbose else discard_stderr():  # MindSpore logs each missing library
        return bool(ms.hal.is_available(name))


def choose_precision(target: str, cfg: Config) -> Precision:
    """Return the precision of the network: float32 without ``mix``, else that of ``amp_level``.

    ``amp_level: auto`` is O2: float16 with a scaled loss, but batch norms, softmax and loss in float32.
    """
    level = ("O2" if cfg.amp_level == "auto" else cfg.amp_level) if cfg.mix else "O0"
    if level == "O0":
        return Precision(level, False, "float32" + (", because amp_level is O0" if cfg.mix else ""))
    level_description = {
        "O1": "O1: convolutions in float16",
        "O2": "O2: float16, but batch norms, softmax and loss in float32",
        "O3": "O3: same as O2 (batch norms stay in float32)",
    }[level]
    reason = (
        ", because MindSpore has no bfloat16 convolution on CPU (slower than float32 there)" if target == "CPU" else ""
    )
    scale_description = "dynamic loss scale" if cfg.loss_scale is None else f"loss scale {cfg.loss_scale:g}"
    return Precision(level, True, f"{level_description}{reason}; {scale_description}")


@contextlib.contextmanager
def translate_oom(remedy: str) -> Iterator[None]:
    """Convert out-of-memory errors of MindSpore and NumPy into an `OcrnetError` that ends with ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if not isinstance(error, MemoryError) and not any(word in message.lower() for word in OUT_OF_MEMORY):
            raise
        first_line = next((line for line in message.splitlines() if line.strip()), "allocation failed")
        raise OcrnetError(f"out of memory ({first_line}); {remedy}") from error


def configure(target: str, cfg: Config) -> None:
    """Set MindSpore's execution mode, device target and determinism for the process."""
    mode = ms.GRAPH_MODE if cfg.ms_mode == "graph" else ms.PYNATIVE_MODE
    ms.set_context(mode=mode, device_target=target)
    if cfg.deterministic:
        ms.set_context(deterministic="ON")


def _threads() -> int:
    """Return the number of compute threads: MindSpore's setting, at most the number of cores of this process."""
    limit = int(ms.get_context("runtime_num_threads"))
    return min(limit, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else limit


def describe(
    target: str, device_description: str, precision: Precision, cfg: Config, *, training: bool
) -> tuple[list[str], dict]:
    """Return the startup log lines and the versions for the checkpoint metadata.

    Args:
        target: MindSpore's device target.
        device_description: The description of the device, from `choose_device`.
        precision: The precision, from `choose_precision`.
        cfg: The configuration.
        training: Whether to include the lines that apply only to training.

    Returns:
        The log lines, and a dict of the MindSpore version, the thread count and, on a CPU, the instruction set.
    """
    threads = _threads()
    versions = {"mindspore": ms.__version__, "threads": str(threads)}
    mode = "graph mode" if cfg.ms_mode == "graph" else "PyNative mode"
    lines = [
        f"engine: mindspore {ms.__version__}, {mode}, {threads} thread{'s' if threads > 1 else ''}",
        f"device: {device_description}",
        f"mix: {precision.text}",
    ]
    if target == "CPU":
        isa = versions[ISA] = os.environ[ISA]
        if isa != DEFAULTS[ISA]:
            lines.append(
                f"{ISA} is {isa} in the environment; ocrnet's default, {DEFAULTS[ISA]}, can be 10 times "
                "faster (results differ in their last digits)"
            )
    if cfg.loss_scale is not None and not precision.scaled:
        lines.append("loss_scale: no effect in float32; --mix True enables mixed precision")
    if cfg.deterministic:
        lines.append("deterministic: on")
    lines += [
        f"{name}: no effect on the mindspore engine"
        for name in ("fused_norm", "cuda_graph")
        if training and getattr(cfg, name)
    ]
    if training and cfg.ms_mode == "graph":
        lines.append("the first step compiles the network, which takes a minute or more; later steps are fast")
    return lines, versions
