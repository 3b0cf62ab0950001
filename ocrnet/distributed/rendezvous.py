"""Rendezvous of ranks that mpirun or srun started on one machine: rank 0 writes its port to a file, the port file."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import psutil

from ocrnet.utils.errors import OcrnetError

LAUNCH = ("PMIX_NAMESPACE", "PMIX_SERVER_URI2", "SLURM_JOB_ID", "SLURM_STEP_ID")


def port_file_path() -> Path:
    """Return the path of the file to which rank 0 writes its port.

    The name is a digest of the launcher's job variables, or of the parent process if these are not set. All ranks of
    one launch therefore compute the same path, and different launches compute different paths.
    """
    parts = [f"{name}={os.environ[name]}" for name in LAUNCH if name in os.environ]
    if not any(name in os.environ for name in ("PMIX_NAMESPACE", "SLURM_STEP_ID")):
        parent = psutil.Process(os.getppid())
        parts.append(f"{parent.pid} {parent.create_time()}")
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"ocrnet-ranks-{os.getuid()}-{name}"


def write_port(port_file: Path, port: int) -> None:
    """Write the port of this process, rank 0, to ``port_file``; remove this user's port files of ended launches."""
    _remove_stale(port_file)
    process = psutil.Process()
    text = json.dumps({"port": port, "pid": process.pid, "created": process.create_time()})
    descriptor, temporary = tempfile.mkstemp(prefix=f".{port_file.name}-", dir=port_file.parent)  # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        os.replace(temporary, port_file)
    except OSError as error:
        os.unlink(temporary)
        raise OcrnetError(f"{port_file}: rank 0 cannot write its port to this file ({error.strerror})") from error


def read_port(port_file: Path, timeout: float) -> int:
    """Return the port in ``port_file``; wait up to ``timeout`` seconds for it, then raise `OcrnetError`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (port := _port_of_running_rank_0(port_file)) is not None:
            return port
        time.sleep(0.05)
    raise OcrnetError(
        f"{port_file}: rank 0 has not written its port within {timeout:g} s; check that rank 0 has started"
    )


def _remove_stale(port_file: Path) -> None:
    for path in port_file.parent.glob(f"{port_file.name.rpartition('-')[0]}-*"):
        if _port_of_running_rank_0(path) is None:
            with contextlib.suppress(OSError):
                path.unlink()


def _port_of_running_rank_0(port_file: Path) -> int | None:
    """Return the port in ``port_file``; None if it is missing, belongs to another user, or its rank 0 has ended."""
    with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
        if port_file.stat().st_uid == os.getuid():
            content = json.loads(port_file.read_text(encoding="utf-8"))
            if psutil.Process(content["pid"]).create_time() == content["created"]:
                return int(content["port"])
    return None
