"""Process group of the ranks (MindSpore): `prepare` before MindSpore is imported, then `join`, and finally `leave`.

On CPU, the ranks of MindSpore connect through a scheduler process, whose address is in environment variables. Under
mpirun and srun, `prepare` sets these variables, and rank 0 starts the scheduler. MindSpore's launcher, msrun, sets the
variables itself; it also starts the training script in one more process, as the scheduler, where `prepare` does not
return. In both cases, the scheduler runs in a child process of another process, which monitors it; under mpirun and
srun, this is the guard. The scheduler must outlive the ranks, because a rank that loses the scheduler ends itself by
SIGTERM, even while it exits. The scheduler must end soon after the ranks.

On Ascend and GPU, this module does not change the variables of the launcher (msrun, or mpirun with or without
RANK_TABLE_FILE), and `mindspore.communication.init` uses them for HCCL or NCCL. This part follows MindSpore's source
code; it has not been run.
"""

import atexit
import contextlib
import errno
import hashlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from ocrnet.distributed import rendezvous
from ocrnet.distributed.launcher import World
from ocrnet.engines.mindspore.stderr import discard_stderr
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import SIGNALS, Stopped, set_parent_death_signal

JOIN_TIMEOUT = "MS_TOPO_TIMEOUT"  # variable for the seconds to wait for a missing rank
# Variable for the timeout in seconds of a collective on CPU. The default, 30, is too short while other ranks compile.
COLLECTIVE_TIMEOUT = "MS_CPU_COMM_OP_TIMEOUT"
COLLECTIVES = ("AllReduce", "AllGather")
MPI_VARIABLES = ("OMPI_", "PMIX_", "PMI_")
PROGRAM = (
    "import sys; sys.path[0] = sys.argv[1]; from ocrnet.engines.mindspore import distributed as d; d.{}(*sys.argv[2:])"
)
GRACE = 15.0  # seconds that the scheduler outlives the ranks of its machine: ranks on other machines may still run
TAIL_BYTES = 2000


@dataclass
class Scheduler:
    """Rank 0's handle of the guard, the process that starts and monitors the scheduler."""

    process: subprocess.Popen
    stdin: IO[bytes]  # stdin of the guard
    errors: IO[bytes]  # file with the stderr of the guard and the scheduler
    port_file: Path | None = None  # the file that contains the scheduler's port
    monitoring: bool = False

    def stderr_tail(self) -> str:
        """Return text with the end of the scheduler's stderr, to append to an error message; empty if it is empty."""
        end = os.fstat(self.errors.fileno()).st_size
        text = os.pread(self.errors.fileno(), TAIL_BYTES, max(0, end - TAIL_BYTES)).decode(errors="replace").strip()
        return f"; the scheduler's stderr ends with: {text}" if text else ""

    def monitor(self, pids: list[int], grace: float) -> None:
        """Make the guard keep the scheduler until ``grace`` seconds after the last of these processes has ended."""
        self.monitoring = True
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(f"{grace} {' '.join(map(str, pids))}\n".encode())

    def end(self) -> None:
        """Kill the guard, which ends the scheduler, unless it monitors ranks; remove the port file."""
        if not self.monitoring:
            self.process.kill()
            self.process.wait()
        if self.port_file is not None:
            self.port_file.unlink(missing_ok=True)


_scheduler: Scheduler | None = None  # set only on rank 0
_replaces_msrun = False  # whether `prepare` set the variables that msrun would set
_joined = False
_has_left = False


def prepare(world: World, device_target: str | None, rank_timeout: float) -> None:
    """Set the environment variables that MindSpore reads when it is imported and when the ranks join.

    On a CPU under mpirun or srun, rank 0 also starts the scheduler. In the process that msrun starts as the scheduler,
    this function runs the scheduler and then exits the process.

    Args:
        world: This process's rank and the number of ranks.
        device_target: The value of ``--device_target``, or None.
        rank_timeout: Timeout of a collective on CPU in seconds, rounded up; the environment variable has priority.

    Raises:
        OcrnetError: The launcher is not supported, the address of the scheduler is missing, incomplete or unusable, or
            rank 0 has not written its port in time.
    """
    os.environ.setdefault(JOIN_TIMEOUT, "300")
    os.environ.setdefault(COLLECTIVE_TIMEOUT, str(math.ceil(rank_timeout)))
    role = os.environ.get("MS_ROLE")
    if role == "MS_SCHED":
        _serve_msrun()
    ascend = device_target == "Ascend" or (device_target is None and Path("/dev/davinci_manager").exists())
    if world.size == 1 or ascend or device_target == "GPU":
        return
    atexit.register(_at_exit)  # exit handlers run in reverse order: this one runs after MindSpore's
    if role:
        return
    if world.launcher not in ("mpirun", "srun"):
        raise OcrnetError(f"{world.launcher} started {world.size} processes; on MindSpore use msrun, mpirun or srun")
    _set_msrun_variables(world)


def _set_msrun_variables(world: World) -> None:
    global _replaces_msrun
    user_set = [name for name in ("MS_SCHED_HOST", "MS_SCHED_PORT") if os.environ.get(name)]
    if len(user_set) == 1:
        raise OcrnetError(f"only {user_set[0]} is set; set both MS_SCHED_HOST and MS_SCHED_PORT, or neither")
    if not user_set and not world.on_one_machine:
        raise OcrnetError(
            f"{world.launcher} started ranks on several machines: set MS_SCHED_HOST to the address of rank 0's machine "
            "and MS_SCHED_PORT to a free port there (mpirun -x MS_SCHED_HOST -x MS_SCHED_PORT), or use msrun"
        )
    port_file = rendezvous.port_file_path()
    for name in [name for name in os.environ if name.startswith(MPI_VARIABLES)]:
        del os.environ[name]
    os.environ.update(
        MS_ROLE="MS_WORKER",
        MS_WORKER_NUM=str(world.size),
        MS_NODE_ID=str(world.rank),
        RANK_ID=str(world.rank),
        RANK_SIZE=str(world.size),
        DEVICE_ID=str(world.local),
    )
    os.environ.setdefault("MS_NODE_TIMEOUT", "600")  # long, because the launcher detects a lost rank
    _replaces_msrun = True
    os.environ["MS_SCHED_HOST"] = _address(os.environ["MS_SCHED_HOST"]) if user_set else "127.0.0.1"
    if world.rank == 0:
        _start_scheduler(None if user_set else port_file)
    elif not user_set:
        timeout_s = float(os.environ[JOIN_TIMEOUT])
        os.environ["MS_SCHED_PORT"] = str(rendezvous.read_port(port_file, timeout_s))


def _address(host: str) -> str:
    """Return the IPv4 address of ``host``; MindSpore does not accept host names."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise OcrnetError(f"MS_SCHED_HOST={host}: {error.strerror}") from error


def _start_scheduler(port_file: Path | None) -> None:
    """Start the scheduler at MS_SCHED_HOST, at a free port that is written to ``port_file``; None: at MS_SCHED_PORT."""
    global _scheduler
    host = os.environ["MS_SCHED_HOST"]
    port = int(os.environ["MS_SCHED_PORT"]) if port_file is None else 0
    with socket.socket() as reserved:
        if port:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the previous run may have just released it
        try:
            reserved.bind((host, port))
        except OSError as error:
            reason = (
                "it must be an address of rank 0's machine" if error.errno == errno.EADDRNOTAVAIL else error.strerror
            )
            raise OcrnetError(
                f"MS_SCHED_HOST={host} MS_SCHED_PORT={port}: rank 0 cannot listen on this address: {reason}"
            ) from error
        os.environ["MS_SCHED_PORT"] = str(reserved.getsockname()[1])
        _scheduler = _start_guard(reserved)
    if port_file is not None:
        rendezvous.write_port(port_file, int(os.environ["MS_SCHED_PORT"]))
        _scheduler.port_file = port_file


def _start_guard(reserved: socket.socket) -> Scheduler:
    """Start the scheduler, and a guard process that ends it when the ranks have ended.

    Both inherit the socket that reserves the port, so no other process takes the port before the scheduler listens.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this process
    process = _spawn("guard", reserved.fileno(), stdin=subprocess.PIPE, stderr=errors)
    assert process.stdin is not None
    return Scheduler(process, process.stdin, errors)


def _spawn(function: str, reserved: int | None = None, **options: Any) -> subprocess.Popen:
    """Run a function of this module in a new process, with this process's ID and the reserved socket as arguments."""
    inherited = () if reserved is None else (reserved,)
    env = {name: value for name, value in os.environ.items() if name not in ("MS_NODE_ID", "RANK_ID", "DEVICE_ID")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(function), str(Path(__file__).parents[3]), str(os.getpid()),
         *map(str, inherited)],
        env=env | {"MS_ROLE": "MS_SCHED", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        pass_fds=inherited,
        start_new_session=True,  # signals that a terminal or launcher sends to the process group do not reach it
        **options,
    )  # fmt: skip


def serve(parent: str, reserved: str | None = None) -> None:
    """Run MindSpore's scheduler until all ranks have left or the process ``parent`` has ended."""
    _ignore_signals()
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    import mindspore

    mindspore.set_context(device_target="CPU")
    if reserved is not None:
        os.close(int(reserved))
    mindspore.communication.init()  # returns, or exits the process, when all ranks have left; it blocks Python threads


def guard(parent: str, reserved: str) -> None:
    """Start the scheduler for rank 0, the process ``parent``, and end it when the ranks have ended.

    The ranks are rank 0 and, once it has written them to stdin of this process, those of `Scheduler.monitor`.
    """
    _ignore_signals()
    rank_0 = _process(int(parent))
    scheduler = _spawn("serve", int(reserved), stdin=subprocess.DEVNULL)
    os.close(int(reserved))
    ranks, grace = rank_0, 0.0
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    while scheduler.poll() is None and not ready and _running(ranks):
        ready, _, _ = select.select([sys.stdin], [], [], 0.2)
    if ready and (fields := sys.stdin.readline().split()):
        grace = float(fields[0])
        ranks = [process for pid in fields[1:] for process in _process(int(pid))]
    while scheduler.poll() is None and _running(ranks):
        time.sleep(0.2)
    sys.exit(_wait_or_kill(scheduler, grace))


def _ignore_signals() -> None:
    """Ignore the stop signals: the ranks handle them, and need the scheduler until they have saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _process(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid)]
    return []


def _running(ranks: list[psutil.Process]) -> list[psutil.Process]:
    return [rank for rank in ranks if _runs(rank)]


def _wait_or_kill(scheduler: subprocess.Popen, grace: float) -> int:
    """Wait up to ``grace`` seconds for the scheduler to exit, then kill it; return its exit status, or 1 if killed."""
    try:
        return scheduler.wait(grace)
    except subprocess.TimeoutExpired:
        scheduler.kill()
        return 1


def join(world: World) -> None:
    """Join the process group of all ranks; return when all have joined.

    Raise `OcrnetError` if not all ranks join in time, or if MindSpore's rank and world size differ from ``world``.
    """
    global _joined
    from mindspore import communication

    try:
        if os.environ.get("MS_ROLE") == "MS_WORKER":
            _wait_for_scheduler()
        try:
            communication.init()
        except RuntimeError as error:
            raise OcrnetError(_join_error_message(world, error)) from error
        reported = communication.get_rank(), communication.get_group_size()
        if reported != (world.rank, world.size):
            raise OcrnetError(
                f"MindSpore reports rank {reported[0]} of {reported[1]}, but {world.launcher}'s variables give "
                f"{world.rank} of {world.size}"
            )
        _joined = True
        if _replaces_msrun:
            _send_rank_pids(world)
    finally:
        _end_scheduler()


def _send_rank_pids(world: World) -> None:
    """Send the process IDs of the ranks on rank 0's machine to the guard, which monitors them; this is a collective."""
    machine_id = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big")
    all_ranks = np.zeros((world.size, 2), np.int64)
    all_ranks[world.rank] = machine_id, os.getpid()
    all_ranks = all_sum(all_ranks)
    local_pids = all_ranks[all_ranks[:, 0] == all_ranks[0, 0], 1].tolist()
    if _scheduler is not None:
        _scheduler.monitor(local_pids, 0.0 if len(local_pids) == world.size else GRACE)


def _wait_for_scheduler() -> None:
    """Wait until the scheduler listens: MindSpore can take a minute to retry a failed connection."""
    address = os.environ.get("MS_SCHED_HOST", ""), int(os.environ.get("MS_SCHED_PORT") or 0)
    timeout_s = float(os.environ[JOIN_TIMEOUT])
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=5).close()
            return
        if _scheduler is not None and _scheduler.process.poll() is not None:
            raise OcrnetError(f"MindSpore's scheduler did not start{_scheduler.stderr_tail()}")
        time.sleep(0.05)
    raise OcrnetError(f"MindSpore's scheduler did not respond at {address[0]}:{address[1]} within {timeout_s:g} s")


def _join_error_message(world: World, error: RuntimeError) -> str:
    first_line = next((line for line in str(error).splitlines() if line.strip(" -")), "no reason given")
    timeout_s = os.environ[JOIN_TIMEOUT]
    # msrun sets this variable itself, from its own option.
    setting = "msrun's --cluster_time_out" if world.launcher == "msrun" else JOIN_TIMEOUT
    stderr_tail = _scheduler.stderr_tail() if _scheduler is not None else ""
    return (
        f"rank {world.rank} of {world.size} ({world.launcher}) could not join the other ranks: MindSpore reports "
        f"{first_line!r}; check that all {world.size} ranks start and join within {timeout_s} s ({setting})"
        f"{stderr_tail}"
    )


def _end_scheduler() -> None:
    if _scheduler is not None:
        _scheduler.end()


@contextlib.contextmanager
def translate_lost_peer() -> Iterator[None]:
    """Convert MindSpore's error for a failed collective, which names only an operator, into an `OcrnetError`."""
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in COLLECTIVES):
            raise
        raise OcrnetError(
            "another rank did not take part in a collective: it has ended (see its error message), it hangs, or it is "
            f"slower than {os.environ[COLLECTIVE_TIMEOUT]} s (rank_timeout)"
        ) from error


@translate_lost_peer()
def all_sum(array: np.ndarray) -> np.ndarray:
    """Return the sum of ``array`` over the ranks; shape and dtype must match on all ranks.

    Every rank gathers all arrays and adds them with NumPy in rank order, in the dtype of the result of `np.sum`. The
    sum is therefore exact for integers, counts True values, and is bit-identical on all ranks.
    """
    parts = _gather(array)
    total = parts[0].astype(np.sum(np.zeros(0, array.dtype)).dtype)
    for part in parts[1:]:
        total = total + part
    return np.asarray(total)


def _gather(array: np.ndarray) -> list[np.ndarray]:
    """Return the array of every rank, in rank order.

    The bytes are sent as int32: on CPU, MindSpore corrupts 64-bit types and rejects 8-bit types.
    """
    from mindspore import Tensor, communication, ops

    size = communication.get_group_size()
    raw = np.ascontiguousarray(array).tobytes()
    if not raw:
        return [array] * size
    packed = np.frombuffer(raw + b"\0" * (-len(raw) % 4), np.int32)
    rows = ops.AllGather()(Tensor(packed)).asnumpy().reshape(size, -1)
    return [np.frombuffer(row.tobytes()[: len(raw)], array.dtype).reshape(array.shape) for row in rows]


def leave() -> None:
    """Synchronize with the other ranks, then leave the process group.

    Synchronization is necessary because a rank fails if another one ends while it still receives data. Do not
    synchronize while an exception other than `Stopped` is being handled: the other ranks may be waiting in another
    collective, and the launcher ends them.
    """
    global _joined, _has_left
    if not _joined:
        return
    _joined, _has_left = False, True
    error = sys.exc_info()[1]
    from mindspore import communication
    from mindspore._c_expression import _finalize_collective, set_cluster_exit_with_exception

    if communication.GlobalComm.BACKEND != "mccl":
        return  # HCCL and NCCL end with the process
    together = error is None or isinstance(error, Stopped)
    with discard_stderr():  # MindSpore logs every connection that it closes, at any log level
        if together:
            with contextlib.suppress(RuntimeError):  # another rank may have left already
                all_sum(np.zeros(1, np.int32))
            time.sleep(0.5)  # until all data is sent, which takes longer on a busy machine; other ranks wait for it
            _finalize_collective()
            time.sleep(0.2)  # until MindSpore's threads have written their last messages
    if _replaces_msrun or not together:  # skip unregistering, which segfaults in one of some hundred runs
        set_cluster_exit_with_exception()


def _at_exit() -> None:
    """End the scheduler if not all ranks have joined; after `leave`, discard the stderr of MindSpore's threads."""
    _end_scheduler()
    if _has_left:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _serve_msrun() -> None:
    """Run the scheduler for msrun in a child process until the ranks of this machine have ended, then exit.

    MindSpore's scheduler would wait minutes for ranks that ended before they joined, and msrun would wait for it.
    """
    _ignore_signals()
    run_started = _is_msrun(os.getppid())
    scheduler = _spawn("serve", stdin=subprocess.DEVNULL)
    ranks: list[psutil.Process] = []
    last_active = time.monotonic()
    while scheduler.poll() is None and time.monotonic() - last_active < GRACE:
        time.sleep(1)
        ranks = _running(ranks) or _local_ranks()
        run_started = run_started or bool(ranks)
        if ranks or not run_started:
            last_active = time.monotonic()
    if status := _wait_or_kill(scheduler, 0):
        print("MindSpore's scheduler was killed: it did not detect that all ranks have left", file=sys.stderr)
    sys.exit(1 if status else 0)


def _is_msrun(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(part.endswith(("msrun", "cluster/run.py")) for part in psutil.Process(pid).cmdline()[:3])
    return False


def _local_ranks() -> list[psutil.Process]:
    """Return the running ranks on this machine that belong to this scheduler."""
    expected_env = {"MS_ROLE": "MS_WORKER"} | {
        name: os.environ.get(name, "") for name in ("MS_SCHED_HOST", "MS_SCHED_PORT")
    }
    ranks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            env = process.environ()
            if expected_env.items() <= env.items() and _runs(process):
                ranks.append(process)
    return ranks


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
