"""Which process of how many this is, read from the variables of the launcher that started it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ocrnet.errors import OcrnetError

# (launcher, rank, size, rank on this machine); torchrun before mpirun, because it may run inside a Slurm or MPI job.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("msrun", "MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID"),
    ("rank table", "RANK_ID", "RANK_SIZE", "DEVICE_ID"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)

SCHEDULER = "msrun's scheduler"  # msrun starts the script once more as this; it is no rank, and trains nothing


@dataclass(frozen=True)
class World:
    """This process's ``rank`` of ``size``, its rank on this machine, and the launcher that said so."""

    rank: int = 0
    size: int = 1
    local: int = 0
    launcher: str = "alone"


def read_world(env: Mapping[str, str] = os.environ) -> World:
    """Return the `World` that the launcher's variables describe, or a single process; raise where they contradict."""
    role = env.get("MS_ROLE")
    if role == "MS_SCHED":
        return World(0, _number(env, "MS_WORKER_NUM"), 0, SCHEDULER)
    if role == "MS_WORKER" and "MS_NODE_ID" not in env:
        raise OcrnetError("MS_NODE_ID is not set; where msrun starts ranks on several machines, give it --node_rank")
    for launcher, rank, size, local in LAUNCHERS:
        if rank in env and size in env:
            world = World(_number(env, rank), _number(env, size), _number(env, local, "0"), launcher)
            if not 0 <= world.rank < world.size:
                raise OcrnetError(
                    f"{launcher} says {rank}={world.rank} and {size}={world.size}; a rank is below the size"
                )
            return world
    return World()


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    text = env.get(name, default)
    if not text.isdigit():
        raise OcrnetError(f"the launcher's variable {name} is {text!r}, but must be a whole number")
    return int(text)
