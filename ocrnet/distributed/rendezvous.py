"""How ranks started by mpirun or srun on one machine find rank 0: it writes its port to a file, the board."""

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
    """Return the path of the file for rank 0's port; only the ranks of this launch can derive its name."""
    parts = [f"{name}={os.environ[name]}" for name in LAUNCH if name in os.environ]
    if not any(name in os.environ for name in ("PMIX_NAMESPACE", "SLURM_STEP_ID")):
        parent = psutil.Process(os.getppid())
        parts.append(f"{parent.pid} {parent.create_time()}")
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"ocrnet-ranks-{os.getuid()}-{name}"


def write_port(port_file: Path, port: int) -> None:
    """Write this process's port to the board; remove the boards that killed launches of this user left behind."""
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
    """Wait at most ``patience`` seconds for the port of a running rank 0; raise `OcrnetError` on timeout."""
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
    """Return the port on a board; None if it is missing, is another user's, or its rank 0 no longer runs."""
    with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
        if port_file.stat().st_uid == os.getuid():
            content = json.loads(port_file.read_text(encoding="utf-8"))
            if psutil.Process(content["pid"]).create_time() == content["created"]:
                return int(content["port"])
    return None
