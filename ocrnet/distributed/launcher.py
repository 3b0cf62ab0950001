"""Read the rank and the world size from the environment variables of the launcher."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ocrnet.utils.errors import OcrnetError

# Each row: launcher, and its variables for rank, world size, local rank and local world size. The first row whose rank
# and world size are set is used. torchrun comes first because it may run inside a Slurm or MPI job. Slurm's last
# variable is a list with one entry per machine: see `_local_size`.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("msrun", "MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID", ""),
    ("rank table", "RANK_ID", "RANK_SIZE", "DEVICE_ID", ""),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip

SCHEDULER = "msrun's scheduler"  # msrun also starts the script as this process; it is not a rank and does not train


@dataclass(frozen=True)
class World:
    """The rank of this process, the world size, the local rank, and the launcher whose variables set them.

    ``local`` is the rank among the ranks on this machine. ``local_size`` is their number; 0 if the launcher does not
    provide it. ``launcher`` is ``none`` for a process without a launcher.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    launcher: str = "none"
    local_size: int = 0

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks are on this machine; True if the launcher does not provide ``local_size``."""
        return self.local_size in (0, self.size)


def read_world(env: Mapping[str, str] = os.environ) -> World:
    """Return the `World` that the launcher's variables describe; without a launcher, rank 0 of 1.

    Raise `OcrnetError` if a variable is invalid or missing.
    """
    role = env.get("MS_ROLE")
    if role == "MS_SCHED":
        size = _number(env, "MS_WORKER_NUM")
        return World(0, size, 0, SCHEDULER)
    if role == "MS_WORKER" and "MS_NODE_ID" not in env:
        raise OcrnetError("MS_NODE_ID is not set; if msrun starts ranks on several machines, pass --node_rank to msrun")
    for launcher, rank_name, size_name, local_name, local_size_name in LAUNCHERS:
        if rank_name in env and size_name in env:
            numbers = _number(env, rank_name), _number(env, size_name), _number(env, local_name, "0")
            world = World(*numbers, launcher, _local_size(env, local_size_name))
            if not 0 <= world.rank < world.size:
                raise OcrnetError(
                    f"{launcher} sets {rank_name}={world.rank} and {size_name}={world.size}; "
                    f"{rank_name} must be less than {size_name}"
                )
            return world
    return World()


def _local_size(env: Mapping[str, str], name: str) -> int:
    """Return the number of ranks on this machine; 0 if the launcher does not provide it."""
    text = env.get(name, "")
    if not name.startswith("SLURM_"):
        return _number(env, name) if text else 0
    counts: list[int] = []  # 2(x3),1 means 2, 2, 2, 1
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeats or 1)
    node = _number(env, "SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else 0


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    text = env.get(name, default)
    if not text.isdigit():
        raise OcrnetError(f"the launcher's environment variable {name} is {text!r}, but must be a whole number")
    return int(text)
