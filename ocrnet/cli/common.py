"""Functions shared by several commands: argument parsing, and rank and world size."""

import argparse
import contextlib
import signal
from typing import NoReturn

from ocrnet.distributed.launcher import SCHEDULER, World, read_world
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import set_parent_death_signal


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `OcrnetError` for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise `OcrnetError` with the message and a reference to --help."""
        raise OcrnetError(f"{message} ({self.prog} --help)")


def world_of_launcher() -> World:
    """Return the rank and world size that the launcher set; from then on, only rank 0 logs.

    If mpirun, msrun or torchrun started several ranks, the process also requests SIGTERM for the case that the launcher
    dies, so that it saves a checkpoint and stops.
    """
    world = read_world()
    scheduler = world.launcher == SCHEDULER
    log.set_rank(world.rank, first_of_machine=world.local == 0 and not scheduler, scheduler=scheduler)
    if world.size > 1 and world.launcher in ("mpirun", "msrun", "torchrun"):
        # mutation: end-with-launcher
        set_parent_death_signal(signal.SIGTERM)
    return world


def rank_prefix() -> str:
    """Return the prefix of error messages, "rank N: ", or an empty string for a single process."""
    with contextlib.suppress(OcrnetError):  # the launcher's variables may be invalid
        world = read_world()
        if world.size > 1:
            return f"rank {world.rank}: "
    return ""
