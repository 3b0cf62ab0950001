"""Choice of the device and the precision, and the log lines that describe them."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ocrnet.config import Config
from ocrnet.utils.errors import OcrnetError


@dataclass(frozen=True)
class Precision:
    """The precision of a run.

    ``dtype`` is the dtype of the convolutions. ``autocast`` returns a new context manager on each call. ``scaled``:
    whether the loss is multiplied by a dynamic scale. ``text`` describes the precision in the log, with the reason.
    """

    dtype: torch.dtype
    autocast: Callable[[], contextlib.AbstractContextManager]
    scaled: bool
    text: str


def choose_device(target: str | None, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device for ``--device_target`` and its description for the log.

    Local rank i uses GPU i. Raise `OcrnetError` if a GPU is requested but PyTorch detects none, or if the machine has
    fewer GPUs than local ranks.
    """
    if target == "GPU" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise OcrnetError(
            f"device_target GPU: PyTorch {torch.__version__} ({build}) sees no GPU; use --device_target CPU"
        )
    if target == "GPU" or (target is None and torch.cuda.is_available()):
        if local_rank >= (num_gpus := torch.cuda.device_count()):
            raise OcrnetError(
                f"this is process {local_rank + 1} on its machine, but PyTorch sees only {num_gpus} "
                f"GPU{'s' if num_gpus > 1 else ''}; start one process per GPU"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank), f"GPU ({torch.cuda.get_device_name(local_rank)})"
    return torch.device("cpu"), "CPU" if target else "CPU, because PyTorch sees no GPU"


def choose_precision(device: torch.device, mix: bool) -> Precision:
    """Return the precision of the convolutions: float32 without ``mix``.

    With ``mix``, it is bfloat16 if the device supports it natively. Otherwise it is float16 with a dynamic loss scale
    on a GPU, and float32 on a CPU.
    """
    if not mix:
        return Precision(torch.float32, contextlib.nullcontext, False, "float32")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return _mixed("cuda", torch.bfloat16, "bfloat16")
        description = "float16 with a dynamic loss scale, because this GPU has no bfloat16"
        return _mixed("cuda", torch.float16, description)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _mixed("cpu", torch.bfloat16, "bfloat16")
    description = "float32, because this CPU has no bfloat16 instructions"
    return Precision(torch.float32, contextlib.nullcontext, False, description)


def _mixed(device_type: str, dtype: torch.dtype, text: str) -> Precision:
    return Precision(dtype, lambda: torch.autocast(device_type, dtype), dtype == torch.float16, text)


@contextlib.contextmanager
def translate_oom(remedy: str) -> Iterator[None]:
    """Convert out-of-memory errors of PyTorch and NumPy into an `OcrnetError` that ends with ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in message:
            raise
        first_line = message.splitlines()[0] if message else "allocation failed"
        raise OcrnetError(f"out of memory ({first_line}); {remedy}") from error


def configure(device: torch.device, *, deterministic: bool) -> None:
    """Configure PyTorch for bit-identical results if ``deterministic``, else for the fastest convolutions."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # `use_deterministic_algorithms` has the same effect, but also imports the compiler, which is slow.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")


def fused_norm_unavailable_reason(device: torch.device, cfg: Config, ranks: int) -> str | None:
    """Return why fused_norm is unavailable.

    Args:
        device: The device of this rank.
        cfg: The configuration; only ``norm`` is read.
        ranks: The number of ranks.

    Returns:
        The reason, which completes the log line "fused_norm: no effect ..."; None if fused_norm is available.
    """
    if device.type != "cuda":
        return "on a CPU"
    if importlib.util.find_spec("triton") is None:
        return "without Triton, which PyTorch's CUDA builds include"
    if cfg.norm == "sync" and ranks > 1:
        return f"with batch norm over {ranks} ranks; --set norm=local computes it per rank"
    return None


def cuda_graph_unavailable_reason(device: torch.device, ranks: int) -> str | None:
    """Return why cuda_graph is unavailable, to complete "cuda_graph: no effect ..."; None if it is available."""
    if device.type != "cuda":
        return "on a CPU"
    return f"on {ranks} ranks" if ranks > 1 else None


def describe(
    device: torch.device, device_description: str, precision: Precision, cfg: Config, *, training: bool, ranks: int
) -> tuple[list[str], dict[str, str]]:
    """Return the startup log lines and the versions for the checkpoint metadata.

    Args:
        device: The device of this rank.
        device_description: The description of the device, from `choose_device`.
        precision: The chosen precision.
        cfg: The configuration.
        training: Whether to include the lines that apply only to training.
        ranks: The number of ranks.

    Returns:
        The log lines, and a dict of the PyTorch version, the thread count and, on a GPU, CUDA version and GPU name.
    """
    versions = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name(device)}
    lines = [
        f"engine: torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"device: {device_description}",
        f"mix: {precision.text}",
    ]
    if cfg.deterministic:
        lines.append("deterministic: on")
    unavailable_reasons = {
        "fused_norm": fused_norm_unavailable_reason(device, cfg, ranks),
        "cuda_graph": cuda_graph_unavailable_reason(device, ranks),
    }
    for name, reason in unavailable_reasons.items():
        if training and getattr(cfg, name):
            lines.append(f"{name}: no effect {reason}" if reason else f"{name}: on")
    lines += [
        f"{name}: no effect on the torch engine"
        for name in ("amp_level", "ms_mode", "loss_scale", "max_rowsize")
        if getattr(cfg, name) != getattr(Config, name)
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if training and cfg.num_workers > cores:
        lines.append(
            f"num_workers: {cfg.num_workers} on {cores} cores; lower it if training waits for data or memory is short"
        )
    return lines, versions
