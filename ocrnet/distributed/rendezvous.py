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


def board_path() -> Path:
    """Return the path of the file for rank 0's port; only the ranks of this launch can derive its name."""
    known = [f"{name}={os.environ[name]}" for name in LAUNCH if name in os.environ]
    if not any(name in os.environ for name in ("PMIX_NAMESPACE", "SLURM_STEP_ID")):
        parent = psutil.Process(os.getppid())
        known.append(f"{parent.pid} {parent.create_time()}")
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"ocrnet-ranks-{os.getuid()}-{name}"


def leave_port(board: Path, port: int) -> None:
    """Write this process's port to the board; remove the boards that killed launches of this user left behind."""
    _clean(board)
    me = psutil.Process()
    text = json.dumps({"port": port, "pid": me.pid, "created": me.create_time()})
    handle, name = tempfile.mkstemp(prefix=f".{board.name}-", dir=board.parent)  # mode 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        os.replace(name, board)
    except OSError as error:
        os.unlink(name)
        raise OcrnetError(f"{board}: rank 0 cannot write its port to this file ({error.strerror})") from error


def read_port(board: Path, patience: float) -> int:
    """Wait at most ``patience`` seconds for the port of a running rank 0; raise `OcrnetError` on timeout."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if (port := _left_by_the_living(board)) is not None:
            return port
        time.sleep(0.05)
    raise OcrnetError(f"{board}: rank 0 has not written its port within {patience:g} s; check that rank 0 has started")


def _clean(board: Path) -> None:
    for old in board.parent.glob(f"{board.name.rpartition('-')[0]}-*"):
        if _left_by_the_living(old) is None:
            with contextlib.suppress(OSError):
                old.unlink()


def _left_by_the_living(board: Path) -> int | None:
    """Return the port on a board; None if it is missing, is another user's, or its rank 0 no longer runs."""
    with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
        if board.stat().st_uid == os.getuid():
            found = json.loads(board.read_text(encoding="utf-8"))
            if psutil.Process(found["pid"]).create_time() == found["created"]:
                return int(found["port"])
    return None
