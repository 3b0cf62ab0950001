"""Logging of the commands: the console, the log file of a run, and the ranks that log.

Every module logs to ``logging.getLogger(__name__)``. By default, only rank 0 logs; ``extra`` selects other ranks::

    logger.info("saved the checkpoint")                          # on rank 0
    logger.info("downloading data.tar", extra=ANY_RANK)          # on the rank that calls it
    logger.info("waiting for a download", extra=EACH_MACHINE)    # on the first rank of each machine
"""

import collections
import contextvars
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ocrnet.utils import files, urls
from ocrnet.utils.errors import printable

ANY_RANK: Mapping[str, object] = {"ranks": "any"}
EACH_MACHINE: Mapping[str, object] = {"ranks": "first of machine"}

_ROOT = logging.getLogger("ocrnet")


class _Rank(NamedTuple):
    name: str
    main: bool
    first_of_machine: bool


_MAIN = _Rank("rank 0", True, True)
_rank: contextvars.ContextVar[_Rank] = contextvars.ContextVar("rank", default=_MAIN)

RESULT = 25  # level of results, which are printed even with --quiet
logging.addLevelName(RESULT, "RESULT")


def set_rank(rank: int, *, first_of_machine: bool, scheduler: bool = False) -> None:
    """Set the rank of this thread, which decides what it logs.

    Args:
        rank: The rank; only rank 0 logs messages without ``extra``.
        first_of_machine: Whether this rank logs messages with `EACH_MACHINE`.
        scheduler: Whether this is msrun's scheduler, which logs only messages with `ANY_RANK`.
    """
    _rank.set(_Rank("scheduler" if scheduler else f"rank {rank}", rank == 0 and not scheduler, first_of_machine))


def open_console(level: int = logging.INFO, *, needs_reader: bool = True) -> None:
    """Print the messages of this package, and keep them for the log file of a run; drop all earlier handlers.

    Args:
        level: The lowest level that is printed.
        needs_reader: Whether a closed stdout raises an `OSError`; otherwise, and always when a run has its log file,
            the command continues without printing.
    """
    for handler in list(_ROOT.handlers):
        _ROOT.removeHandler(handler)
    _ROOT.setLevel(min(level, logging.INFO))
    _ROOT.addHandler(_Console(level, needs_reader=needs_reader))
    _ROOT.addHandler(_Buffer(logging.INFO))


def open_file(path: Path) -> None:
    """Append all later messages, and those that `open_console` has kept, to the log file of a run.

    Args:
        path: The file; it replaces the one of an earlier call.

    Raises:
        OcrnetError: The file cannot be written. Later messages also raise it.
    """
    close_file()
    _ROOT.setLevel(min(_ROOT.level or logging.INFO, logging.INFO))
    kept = [record for handler in _ROOT.handlers if isinstance(handler, _Buffer) for record in handler.take()]
    file = _RunFile(path)
    for record in kept:
        file.handle(record)
    _ROOT.addHandler(file)


def close_file() -> None:
    """Stop writing to the log file of the run."""
    for handler in list(_ROOT.handlers):
        if isinstance(handler, _RunFile):
            _ROOT.removeHandler(handler)


class _Handler(logging.Handler):
    """Handles the messages of this rank. An exception while writing reaches the caller of the logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this rank logs the message."""
        rank, ranks = _rank.get(), getattr(record, "ranks", "main")
        return ranks == "any" or (rank.first_of_machine if ranks == "first of machine" else rank.main)

    def format(self, record: logging.LogRecord) -> str:
        """Return the message after its rank and level, without credentials and control characters."""
        rank = _rank.get()
        lead = f"{rank.name}: " if getattr(record, "ranks", "main") == "any" and not rank.main else ""
        lead += f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return lead + printable(urls.scrub(super().format(record)), lines=True)


class _Console(_Handler):
    """Prints to the current stdout, which a progress bar may have replaced; errors to stderr."""

    def __init__(self, level: int, *, needs_reader: bool) -> None:
        super().__init__(level)
        self._needs_reader = needs_reader

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        try:
            print(self.format(record), file=sys.stderr if record.levelno >= logging.ERROR else sys.stdout, flush=True)
        except OSError:
            if self._needs_reader and not any(isinstance(handler, _RunFile) for handler in _ROOT.handlers):
                raise
            redirect_stdout_to_devnull()  # the terminal or the pipe is closed; the run continues with its log file


class _Buffer(_Handler):
    """Keeps messages until the folder of the run is open."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._records: collections.deque[logging.LogRecord] = collections.deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        """Return the messages; keep no more."""
        _ROOT.removeHandler(self)
        return list(self._records)


class _RunFile(_Handler):
    """Appends messages with their time to a file.

    The file is opened for each message, because its folder may be removed, or its disk be full, during a run.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path

    def format(self, record: logging.LogRecord) -> str:
        """Return the message after the local time."""
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{created} {super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message; raise `OcrnetError` if the file cannot be written."""
        with files.translate_write_errors(self.path):
            files.append_line(self.path, self.format(record))


def redirect_stdout_to_devnull() -> None:
    """Redirect stdout to /dev/null, because its reader is gone."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
