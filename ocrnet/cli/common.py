"""What several commands share: the argument parser, the ranks of a launcher, printing."""

import argparse
import contextlib
import signal
from typing import NoReturn

from ocrnet.distributed.launcher import World, read_world
from ocrnet.utils.errors import OcrnetError, printable
from ocrnet.utils.signals import set_parent_death_signal


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `OcrnetError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise OcrnetError(f"{message} ({self.prog} --help)")


def world_of_launcher() -> World:
    """Return rank and world size; if the launcher dies, this process gets SIGTERM, so that it saves and stops."""
    world = read_world()
    if world.size > 1 and world.launcher in ("mpirun", "msrun", "torchrun"):
        # mutation: end-with-launcher
        set_parent_death_signal(signal.SIGTERM)
    return world


def rank_prefix() -> str:
    """Return a prefix for messages that names the rank; empty for a single process."""
    with contextlib.suppress(OcrnetError):  # the launcher's variables themselves may be what is wrong
        world = read_world()
        if world.size > 1:
            return f"rank {world.rank}: "
    return ""


def say(line: str) -> None:
    """Print a line, with control characters escaped."""
    print(printable(line, lines=True), flush=True)
