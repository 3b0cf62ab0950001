"""Process group of the ranks (torch.distributed), and sums of counts and gradients over the ranks."""

import contextlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ocrnet.distributed import rendezvous
from ocrnet.distributed.launcher import World
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: all-reduces of this size overlap with the backward pass


def join(world: World, device: torch.device, timeout_s: float) -> None:
    """Join the process group of all ranks.

    Unless OMP_NUM_THREADS is set, also divide the number of CPU threads equally between the ranks on this machine.

    Args:
        world: This process's rank, the number of ranks, and the launcher.
        device: The device of this rank; its type selects the backend (Gloo on a CPU, also NCCL on a GPU).
        timeout_s: Timeout in seconds for joining and for every later collective.

    Raises:
        OcrnetError: This rank cannot connect to the others within ``timeout_s`` seconds, or the environment variables
            of the rendezvous are incomplete.
    """
    timeout = timedelta(seconds=timeout_s)
    if "OMP_NUM_THREADS" not in os.environ and world.local_size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))
    try:
        store = _store(world, timeout)
        _choose_interface(world, store)
        # mutation: separate-store-per-start
        store = dist.PrefixStore(_launch_id(store, world, timeout_s), store)
        # mutation: give-up-hanging-rank
        dist.init_process_group(
            BACKENDS[device.type], store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
        all_sum(np.zeros(1, np.int64))  # the first collective opens the connections, so their errors are raised here
    except OcrnetError:
        raise
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise OcrnetError(
            f"{world.launcher}: rank {world.rank} of {world.size} could not join the other ranks within "
            f"{timeout_s:g} s (rank_timeout): {first_line}"
        ) from error


def _store(world: World, timeout: timedelta) -> dist.Store:
    """Connect to the key-value store for the rendezvous, which torchrun or rank 0 hosts.

    Raise `OcrnetError` if its address is unknown or only one of MASTER_ADDR and MASTER_PORT is set.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if bool(host) != bool(port):
        raise OcrnetError(
            f"only {'MASTER_ADDR' if host else 'MASTER_PORT'} is set; set both MASTER_ADDR and MASTER_PORT, or neither"
        )
    if not host and not world.on_one_machine:
        host, port = _slurm_address(world)
    if host and port:
        hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_master = world.rank == 0 and not hosted_by_torchrun
        return dist.TCPStore(host, int(port), is_master=is_master, timeout=timeout, wait_for_workers=False)
    port_file = rendezvous.port_file_path()
    if world.rank > 0:
        port_of_rank_0 = rendezvous.read_port(port_file, timeout.total_seconds())
        return dist.TCPStore("127.0.0.1", port_of_rank_0, is_master=False, timeout=timeout, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    rendezvous.write_port(port_file, store.port)
    return store


def _slurm_address(world: World) -> tuple[str, str]:
    """Return the host name of rank 0 and a port derived from the job number, from the Slurm variables.

    Raise `OcrnetError` if the launcher is not srun or if the variables have no node list.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if world.launcher != "srun" or not nodes:
        raise OcrnetError(
            f"{world.launcher} started ranks on several machines: set MASTER_ADDR to the address of rank 0's machine "
            "and MASTER_PORT to a free port there (mpirun -x MASTER_ADDR -x MASTER_PORT), or use torchrun"
        )
    job_number = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    return first_host(nodes), str(20_000 + job_number % 10_000)


def first_host(nodes: str) -> str:
    """Return the first host name of a Slurm node list, for example node07 of ``node[07-09,12],login1``."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _choose_interface(world: World, store: dist.Store) -> None:
    """Set GLOO_SOCKET_IFNAME to the network interface whose route leads to rank 0.

    By default, Gloo uses the interface of the address of this host name, which may belong to another network.
    """
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if world.local_size == world.size:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    assert isinstance(store, dist.TCPStore)
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((store.host, store.port))  # sends no packet, but selects the route
        own_address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own_address for address in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def _launch_id(store: dist.Store, world: World, timeout_s: float) -> str:
    """Wait for all ranks of this launch; return an identifier that only they share.

    torchrun keeps its store when it restarts the ranks, including the keys of dead processes. Each rank therefore
    writes a random token, and only a running rank 0 replies to it with its own token, which is the identifier. Raise
    RuntimeError if a rank is missing after ``timeout_s`` seconds.
    """
    token, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
    missing = set(range(1, world.size)) if world.rank == 0 else {0}
    if world.rank > 0:
        store.set(f"token/{world.rank}", token)
    while time.monotonic() < deadline:
        if world.rank > 0 and store.check([f"reply/{token}"]):
            launch_id = store.get(f"reply/{token}").decode()
            store.set(f"joined/{launch_id}/{world.rank}", "")
            return launch_id
        for rank in sorted(missing) if world.rank == 0 else ():
            if store.check([f"joined/{token}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"token/{rank}"]):
                store.set(f"reply/{store.get(f'token/{rank}').decode()}", token)
        if not missing:
            return token
        time.sleep(0.02)
    raise RuntimeError(f"missing ranks: {', '.join(map(str, sorted(missing)))}")


def leave() -> None:
    """Synchronize with the other ranks, then destroy the process group.

    Do nothing while an exception other than `Stopped` is being handled: the other ranks may not call this function.
    """
    error = sys.exc_info()[1]
    if dist.is_initialized() and (error is None or isinstance(error, Stopped)):
        with contextlib.suppress(RuntimeError):  # another rank may have left already
            all_sum(np.zeros(1, np.int64))
        dist.destroy_process_group()


@contextlib.contextmanager
def translate_lost_peer(timeout_s: float) -> Iterator[None]:
    """Convert the errors of torch.distributed for a rank that ended or is late into an `OcrnetError`."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in message.lower():
            raise
        if "timed out" in message.lower():
            raise OcrnetError(
                f"another rank did not take part in a collective within {timeout_s:g} s (rank_timeout); "
                "it hangs, or it needs a larger rank_timeout"
            ) from error
        raise OcrnetError("another rank has ended; see its error message or that of the launcher") from error


def all_sum(array: np.ndarray) -> np.ndarray:
    """Return the sum of ``array`` over the ranks, exact for int64; shape and dtype must match on all ranks."""
    tensor = torch.from_numpy(np.array(array))  # a copy, because all_reduce works in place
    dist.all_reduce(tensor)
    return tensor.numpy()


class GradientSum:
    """All-reduce of the gradients in buckets, which overlaps with the backward pass.

    A bucket is a flat tensor; the ``grad`` of each of its parameters is a view of it. The buckets and their order never
    change, so a resumed run adds in the same order. DistributedDataParallel does not guarantee this: it rebuilds its
    buckets after the first step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.buckets: list[Tensor] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._sizes: list[int] = []
        group: list[nn.Parameter] = []
        for parameter in reversed(list(parameters)):  # approximately the order of the backward pass
            group.append(parameter)
            if sum(p.numel() * p.element_size() for p in group) >= BUCKET_BYTES:
                self._add_bucket(group)
                group = []
        if group:
            self._add_bucket(group)
        self._handles: list[dist.Work] = []
        self._pending: list[int] = []
        self._is_last_micro_batch = False

    def _add_bucket(self, group: list[nn.Parameter]) -> None:
        flat = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
        start = 0
        for parameter in group:
            part = flat[start : start + parameter.numel()]
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
            self._bucket_of[parameter] = len(self.buckets)
            start += parameter.numel()
        self.buckets.append(flat)
        self._sizes.append(len(group))

    def begin(self) -> None:
        """Set all gradients to zero before the first micro-batch of a step."""
        torch._foreach_zero_(self.buckets)

    def expect(self, *, last: bool) -> None:
        """Prepare for the backward pass of a micro-batch; that of the ``last`` one of a step starts the all-reduces."""
        self._is_last_micro_batch, self._pending, self._handles = last, list(self._sizes), []

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._is_last_micro_batch:
            return
        self._pending[self._bucket_of[parameter]] -= 1
        while len(self._handles) < len(self.buckets) and self._pending[len(self._handles)] == 0:
            self._start_all_reduce()

    def _start_all_reduce(self) -> None:
        """Start the all-reduce of the next bucket; all ranks use the same order of buckets."""
        work = dist.all_reduce(self.buckets[len(self._handles)], async_op=True)
        assert work is not None
        self._handles.append(work)

    def finish(self) -> None:
        """Wait until all gradients are summed over the ranks; on a GPU, the stream waits instead of this process."""
        while len(self._handles) < len(self.buckets):
            self._start_all_reduce()
        for work in self._handles:
            work.wait()
