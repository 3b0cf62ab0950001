"""`ocrnet doctor`: check versions, memory and disk space, and run real training steps on each device."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.cli.common import Parser
from ocrnet.config import Config, Data, Eval
from ocrnet.data.sampler import Sample
from ocrnet.distributed.launcher import World
from ocrnet.engines import factory
from ocrnet.engines.tta import make_passes
from ocrnet.tracking.run_dir import core_versions
from ocrnet.utils import installed
from ocrnet.utils.errors import OcrnetError

GIB = 2**30
STEP_SECONDS = 180
PYTHONS = ((3, 10), (3, 13))
SIZE = 64


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``ok`` is None for information only, ``remedy`` is how to fix the problem."""

    title: str
    ok: bool | None
    detail: str
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Check this machine: versions, memory, disk space, and real training steps on each device."""
    parser = Parser(prog="ocrnet doctor", description=main.__doc__, allow_abbrev=False)
    parser.parse_args(argv)
    failed = False
    for finding in examine():
        print(text(finding), flush=True)
        failed = failed or finding.ok is False
    print("Some checks failed; see the lines marked !!" if failed else "All checks passed")
    return int(failed)


def examine(folder: str = ".") -> Iterator[Finding]:
    """Yield the findings for this machine; ``folder`` is where runs are written, and its disk is checked."""
    yield from versions()
    yield Finding("processor", None, f"{os.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.1f} GiB of memory")
    yield from shared_memory(Path("/dev/shm"))
    yield disk(folder)
    if installed.installed("torch") or installed.installed("mindspore"):
        for device in ("CPU", "GPU"):
            for mix in (False, True):
                yield from step(device, mix)


def versions() -> Iterator[Finding]:
    """Yield the versions of Python and of the packages, and any incompatibilities between them."""
    python = sys.version_info[:2]
    supported = PYTHONS[0] <= python <= PYTHONS[1]
    remedy = "" if supported else "install Python 3.11 and create a new environment: python3.11 -m venv .venv"
    yield Finding("Python", supported, platform.python_version(), remedy)
    for package, version in core_versions().items():
        if package != "python":
            yield Finding(package, None, version)
    frameworks = {name: _installed_version(name) for name in ("torch", "mindspore")}
    for name, installed_version in frameworks.items():
        yield Finding(name, None, installed_version or "not installed")
    if not any(frameworks.values()):
        yield Finding("framework", False, "neither torch nor mindspore is installed", "pip install -r requirements.txt")
    if frameworks["mindspore"] and not np.__version__.startswith("1."):
        remedy = "pip install 'numpy<2' 'opencv-python-headless<5'"
        yield Finding("mindspore", False, f"needs NumPy below 2, but {np.__version__} is installed", remedy)
    opencv_packages = [name for name in ("opencv-python", "opencv-python-headless") if _installed_version(name)]
    if len(opencv_packages) > 1:
        remedy = "pip uninstall -y opencv-python opencv-python-headless; pip install opencv-python-headless"
        yield Finding("OpenCV", False, "opencv-python and opencv-python-headless overwrite each other", remedy)


def shared_memory(folder: Path) -> Iterator[Finding]:
    """Yield the free shared memory, which dataloader workers use to pass batches (Linux only)."""
    if folder.is_dir():
        free = shutil.disk_usage(folder).free / GIB
        remedy = "" if free >= 1 else "docker run --shm-size=8g ..., or train with --set num_workers=0"
        yield Finding("shared memory", free >= 1, f"{free:.1f} GiB free at {folder}", remedy)


def disk(folder: str) -> Finding:
    """Return the free disk space for runs; 5 GiB hold the six W48 checkpoints of a run, 0.6 GB each with momentum."""
    free = shutil.disk_usage(folder).free / GIB
    remedy = "" if free >= 5 else "free disk space, set --save_dir to another disk, or use --set keep_checkpoint=1"
    return Finding("disk", free >= 5, f"{free:.1f} GiB free at {Path(folder).resolve()}", remedy)


def step(device: str, mix: bool) -> Iterator[Finding]:
    """Train and predict on a device in a separate process, so that a crash or a hang becomes a finding.

    Args:
        device: CPU or GPU.
        mix: Whether to use mixed precision.

    Yields:
        One finding, or none where there is no NVIDIA GPU and ``mix`` is set.
    """
    title = f"{device}, {'mixed precision' if mix else 'float32'}"
    command = [sys.executable, "-m", "ocrnet.cli.doctor", device, str(mix)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=STEP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding(title, False, f"no result within {STEP_SECONDS} s", "restart the machine or its GPU driver")
        return
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    if result.returncode == 0:
        yield Finding(title, True, result.stdout.strip().splitlines()[-1])
    elif device == "GPU" and result.returncode == 2 and not _has_nvidia_gpu():
        if not mix:
            yield Finding("GPU", None, "no NVIDIA GPU on this machine")
    elif device == "GPU" and result.returncode == 2:
        remedy = (
            "install the PyTorch build for your driver's CUDA version (the selector on pytorch.org gives the command)"
        )
        yield Finding(title, False, f"an NVIDIA GPU is present, but the step failed: {last}", remedy)
    else:
        remedy = "reinstall the framework: pip install --force-reinstall torch"
        yield Finding(title, False, f"exit status {result.returncode}: {last}", remedy)


def text(finding: Finding) -> str:
    """Return a finding as text: OK, !! (failed) or -- (information) first, and the remedy on a second line."""
    mark = {True: "OK", False: "!!", None: "--"}[finding.ok]
    line = f"{mark}  {finding.title}: {finding.detail}"
    return line + (f"\n      remedy: {finding.remedy}" if finding.remedy else "")


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


class _Stream:
    """A training stream of random images and labels."""

    channels = 16

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng(number)
        image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        return Sample(image, rng.integers(0, 2, (SIZE, SIZE)).astype(np.uint8), np.ones(16, bool))


def _one_step(device: str, mix: bool) -> str:
    """Train two steps and predict once on ``device`` with two dataloader workers; return a one-line summary."""
    arch = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=2, channels=16, key_channels=8)
    data = Data(crop_size=(SIZE, SIZE))
    cfg = Config(device_target=device, mix=mix, num_workers=2, total_step=2, warmup_step=0, data=data)  # type: ignore[arg-type]
    opened = factory.open_engine(cfg, arch, world=World(), stream=_Stream())  # type: ignore[arg-type]
    try:
        opened.restore(architecture.init(arch, 0), 0)
        start = time.perf_counter()
        stats = opened.train(2)
        opened.predict(np.zeros((1, SIZE, SIZE, 3), np.uint8), make_passes(Eval(), (SIZE, SIZE)))
        if not stats.finite.all():
            raise OcrnetError(f"the loss of a training step is not finite: {stats.loss.tolist()}")
    finally:
        opened.close()
    chosen = [line for line in opened.startup_messages if line.startswith(("device", "mix"))]
    return f"{', '.join(chosen)}; trained and predicted in {time.perf_counter() - start:.1f} s"


if __name__ == "__main__":
    try:
        print(_one_step(sys.argv[1], sys.argv[2] == "True"))
    except OcrnetError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
