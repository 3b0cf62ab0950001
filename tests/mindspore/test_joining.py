"""Real processes join under mpirun and msrun: sums are exact, and failed runs end in bounded time without leftovers."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ocrnet.distributed import rendezvous
from ocrnet.distributed.launcher import World
from ocrnet.engines.mindspore import distributed
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MARK = "OCRNET_TEST_MARK"
NOISE = ("[INFO]", "[WARNING]", "[ERROR]", "Traceback", "Exception ignored")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the lock file has mpirun for Linux only")

WORKER = '''
import os, signal, sys, time
import numpy as np
from ocrnet.distributed import rendezvous
from ocrnet.engines.mindspore import distributed
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped
from ocrnet.distributed.launcher import read_world

mode, failing_rank = sys.argv[1], int(sys.argv[2])
world = read_world()
this_rank_fails = world.rank == failing_rank

def check_sum(base):
    """Check the sum over the ranks of an array that differs between ranks."""
    parts = [base if base.dtype == bool else (base - k).astype(base.dtype) for k in range(world.size)]
    want = np.sum(np.stack(parts), axis=0)
    got = distributed.all_sum(parts[world.rank])
    assert got.dtype == want.dtype and got.shape == base.shape, (got.dtype, got.shape)
    assert got.tobytes() == want.tobytes(), (got, want)

if mode == "before" and this_rank_fails:
    sys.exit(2)
distributed.prepare(world, "CPU", 600)
assert not [name for name in os.environ if name.startswith("OMPI_")]
if mode == "killed" and this_rank_fails:
    time.sleep(1)  # the scheduler runs, and the other ranks wait for this one
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "never" and this_rank_fails:
    time.sleep(60)
try:
    distributed.join(world)
except OcrnetError as error:
    print(error, flush=True)
    sys.exit(2)
print(f"pid of rank {world.rank} of {world.size}: {os.getpid()}", flush=True)
import mindspore as ms
ms.set_context(mode=ms.PYNATIVE_MODE)
try:
    if mode in ("sums", "stop"):
        check_sum(np.array([2**53 + 1, -5, 2**24 + 1, -(2**62), 0]))
        check_sum(np.array([2**24 + 1, -7], np.int32))
        check_sum(np.array([200, 255, 3], np.uint8))
        check_sum(np.array([True, False, True]))
        check_sum(np.array([[0.1, 1e300], [-0.0, np.nan]]))
        check_sum(np.array([1 + 1e-7], np.float32))
        check_sum(np.array([0.1, 2.0, 3.0], np.float16)[::2])
        check_sum(np.array(2.5))
        check_sum(np.zeros((0, 3)))
        assert distributed.all_sum(np.array([10**world.rank, 1])).tolist() == [int("1" * world.size), world.size]
    if mode == "during" and this_rank_fails:
        raise OcrnetError("this rank fails")
    if mode == "late" and this_rank_fails:
        time.sleep(40)
    if mode in ("during", "late"):
        from mindspore import Tensor, ops
        assert ops.AllReduce()(Tensor(np.ones(3, np.float32))).asnumpy()[0] == world.size
    if mode == "stop":
        raise Stopped(signal.SIGTERM)
except (OcrnetError, Stopped) as error:
    distributed.leave()
    sys.exit(getattr(error, "status", 2))
distributed.leave()
print("left", flush=True)
'''


class Launch:
    """A launcher in the background, and every process that descends from it."""

    def __init__(self, folder: Path, command: list[str | Path], mode: str, failing_rank: int, **variables: str) -> None:
        script = folder / "worker.py"
        script.write_text(WORKER)
        self.mark = uuid.uuid4().hex
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MS_", "RANK_", "DEVICE_ID"))}
        env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(ROOT), MARK: self.mark, **variables}
        self.process = subprocess.Popen(
            [*command, script, mode, str(failing_rank)],
            cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, within: float = 60) -> tuple[int, str]:
        """Return the launcher's exit status and the output of it and its ranks. No process may outlive it."""
        try:
            out, _ = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for _ in range(50):
            if not (remaining := self.remaining()):
                return self.process.returncode, out
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"still running: {remaining}\n{out}")

    def remaining(self) -> list[str]:
        return [f"{process.pid} {process.cmdline()}" for process in self._all()]

    def kill(self) -> None:
        for process in [*self._all(), self.process]:
            process.kill()

    def _all(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    yield process


def mpirun(folder: Path, size: int, mode: str, failing_rank: int = -1, **variables: str) -> Launch:
    return Launch(
        folder, [BIN / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(size), sys.executable],
        mode, failing_rank, **variables,
    )  # fmt: skip


def msrun(folder: Path, size: int, mode: str, failing_rank: int = -1) -> Launch:
    port = 20000 + os.getpid() % 10000
    return Launch(
        folder,
        [BIN / "msrun", f"--worker_num={size}", f"--local_worker_num={size}", f"--master_port={port}", "--join=True",
         f"--log_dir={folder / 'log'}"],
        mode, failing_rank,
    )  # fmt: skip


@linux
def test_two_jobs_under_mpirun_sum_exactly_and_stay_separate(tmp_path):
    own = tempfile.mkdtemp(prefix="ocrnet-")  # short, for the launcher's sockets
    jobs = [mpirun(tmp_path, 2, "stop", TMPDIR=own), mpirun(tmp_path, 3, "sums", TMPDIR=own)]
    for size, job, status in zip((2, 3), jobs, (143, 0), strict=True):
        found, out = job.wait()
        assert found == status, out
        assert out.count(f" of {size}: ") == size, out
        assert out.count("left\n") == (size if status == 0 else 0)
        assert not [word for word in NOISE if word in out], out
    assert not list(Path(own).glob("ocrnet-ranks-*"))
    shutil.rmtree(own)


@linux
def test_msrun_sums_exactly(tmp_path):
    status, out = msrun(tmp_path, 2, "sums").wait()
    assert status == 0, out
    assert out.count(" of 2: ") == 2, out
    assert "[ERROR]" not in out


@linux
@pytest.mark.parametrize(
    ("mode", "failing_rank", "status"),
    [("before", 1, 2), pytest.param("during", 1, 2, marks=pytest.mark.long), ("killed", 0, 137)],
)
def test_mpirun_exits_with_the_status_of_the_failed_rank(mode, failing_rank, status, tmp_path):
    started = time.monotonic()
    found, out = mpirun(tmp_path, 2, mode, failing_rank).wait()
    assert found == status, out
    assert "Traceback" not in out
    assert time.monotonic() - started < 50


@pytest.mark.long
@pytest.mark.parametrize(("mode", "failing_rank"), [("before", 1), ("during", 1), ("killed", 0)])
def test_msrun_exits_soon_after_a_rank_fails(mode, failing_rank, tmp_path):
    status, out = msrun(tmp_path, 2, mode, failing_rank).wait(within=80)
    assert status == 1, out


@pytest.mark.long
def test_ranks_wait_for_a_slow_rank(tmp_path):
    status, out = mpirun(tmp_path, 2, "late", 1).wait(within=100)
    assert status == 0, out


@pytest.mark.long
def test_the_error_reports_ranks_that_never_join(tmp_path):
    status, out = mpirun(tmp_path, 2, "never", 1, MS_TOPO_TIMEOUT="15").wait(within=100)
    assert status == 2, out
    assert "rank 0 of 2 (mpirun) could not join the other ranks" in out
    assert "check that all 2 ranks start and join within 15 s" in out


@pytest.mark.long
def test_the_scheduler_port_set_by_the_user_is_used(tmp_path):
    port = str(20000 + os.getpid() % 10000)
    for _ in range(2):  # the second launch uses the same port immediately
        status, out = mpirun(tmp_path, 2, "sums", MS_SCHED_HOST="localhost", MS_SCHED_PORT=port).wait()
        assert status == 0, out


@pytest.fixture
def env(monkeypatch, tmp_path) -> Iterator[dict[str, str]]:
    """Yield os.environ without launcher variables; restore it after the test."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("MS_", "SLURM_", *distributed.MPI_VARIABLES))]:
        del os.environ[name]
    os.environ["MS_TOPO_TIMEOUT"] = "0.3"
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(distributed, "_replaces_msrun", False)
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def assert_rejected(world: World, *words: str) -> None:
    with pytest.raises(OcrnetError) as caught:
        distributed.prepare(world, "CPU", 600)
    for word in words:
        assert word in str(caught.value)


def test_launches_that_cannot_join_are_rejected_with_a_remedy(env):
    assert_rejected(World(1, 2, 1, "torchrun"), "torchrun started 2 processes", "msrun, mpirun or srun")
    assert_rejected(World(0, 2, 0, "mpirun", 1), "several machines", "MS_SCHED_HOST", "msrun")
    assert_rejected(World(0, 2, 0, "srun", 1), "srun started ranks on several machines")
    env["MS_SCHED_PORT"] = "4000"
    assert_rejected(World(0, 2, 0, "mpirun"), "only MS_SCHED_PORT is set")
    env["MS_SCHED_HOST"] = "192.0.2.1"
    assert_rejected(World(0, 2, 0, "mpirun"), "192.0.2.1", "an address of rank 0's machine")


def test_the_port_of_a_running_rank_0_is_used_and_that_of_a_dead_one_is_not(env, tmp_path):
    world = World(1, 2, 1, "mpirun")
    board = rendezvous.port_file_path()
    assert_rejected(world, str(board), "rank 0 has not written its port", "within 0.3 s")
    del env["MS_ROLE"], env["MS_SCHED_HOST"]
    rendezvous.write_port(board, 4321)
    assert board.stat().st_mode & 0o777 == 0o600
    distributed.prepare(world, "CPU", 600)
    assert (env["MS_SCHED_HOST"], env["MS_SCHED_PORT"], env["MS_ROLE"]) == ("127.0.0.1", "4321", "MS_WORKER")
    assert (env["MS_NODE_ID"], env["RANK_ID"], env["RANK_SIZE"], env["DEVICE_ID"]) == ("1", "1", "2", "1")
    rendezvous._remove_stale(board)
    assert board.exists()
    # Simulate that another process has the pid now.
    board.write_text(board.read_text().replace('"created": ', '"created": 1'))
    del env["MS_ROLE"], env["MS_SCHED_HOST"], env["MS_SCHED_PORT"]
    assert_rejected(world, "rank 0 has not written its port")
    rendezvous._remove_stale(board)
    assert list(tmp_path.iterdir()) == []


def test_each_launch_has_its_own_rendezvous_file(env):
    def path(**changes: str) -> Path:
        env.update(changes)
        return rendezvous.port_file_path()

    paths = [path(), path(SLURM_JOB_ID="1", SLURM_STEP_ID="0"), path(SLURM_STEP_ID="1"),
             path(PMIX_NAMESPACE="prterun-a-1@1"), path(PMIX_NAMESPACE="prterun-a-2@1")]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert rendezvous.port_file_path() == paths[-1]


@pytest.mark.parametrize("target", ["Ascend", "GPU"])
def test_the_launchers_variables_stay_on_ascend_and_gpu(target, env):
    env["OMPI_COMM_WORLD_RANK"] = "1"
    before = dict(env)
    distributed.prepare(World(1, 2, 1, "mpirun"), target, 600)
    assert dict(env) == {"MS_TOPO_TIMEOUT": "300", "MS_CPU_COMM_OP_TIMEOUT": "600"} | before
