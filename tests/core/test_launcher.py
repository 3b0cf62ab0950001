"""Rank and world size from the environment variables of launchers."""

import pytest

from ocrnet.distributed.launcher import World, read_world
from ocrnet.utils.errors import OcrnetError

OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}

MSRUN_SCHEDULER = {"MS_ROLE": "MS_SCHED", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8118",
                   "MS_TOPO_TIMEOUT": "600", "MS_WORKER_NUM": "2", "RANK_SIZE": "2", "RANK_ID": "0"}  # fmt: skip
MSRUN = MSRUN_SCHEDULER | {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1", "RANK_ID": "1", "DEVICE_ID": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        (OMPI, World(1, 4, 1, "mpirun")),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(5, 8, 1, "torchrun")),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, World(1, 4, 1, "mpirun", 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, World(0, 2, 0, "srun")),
        (SRUN, World(5, 7, 1, "srun", 2)),
        (SRUN | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}, World(6, 7, 0, "srun", 1)),
        ({"RANK_ID": "3", "RANK_SIZE": "8", "DEVICE_ID": "3"}, World(3, 8, 3, "rank table")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, World(1, 2, 0, "mpirun")),
        ({"RANK": "0"}, World()),
        (MSRUN, World(1, 2, 1, "msrun")),
        (MSRUN | {"MS_NODE_ID": "9", "MS_WORKER_NUM": "16", "RANK_ID": "9"}, World(9, 16, 1, "msrun")),
        (MSRUN_SCHEDULER, World(0, 2, 0, "msrun's scheduler")),
    ],
)  # fmt: skip
def test_rank_and_world_size_are_read_from_the_variables_of_launchers(env, world):
    assert read_world(env) == world


@pytest.mark.parametrize("env", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_invalid_variables_are_refused(env):
    with pytest.raises(OcrnetError):
        read_world(env)


def test_msrun_without_a_node_id_is_refused():
    # Without MS_NODE_ID, RANK_ID is that of the scheduler, 0.
    env = {name: value for name, value in MSRUN.items() if name != "MS_NODE_ID"}
    with pytest.raises(OcrnetError, match="--node_rank"):
        read_world(env)
