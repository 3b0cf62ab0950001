"""Collectives for integers, strings and errors, built on the sum over the ranks (`Engine.sum`).

All ranks must call these functions in the same order. With one rank, they do not communicate.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ocrnet.engines.base import Engine
from ocrnet.utils.errors import OcrnetError


def all_gather(engine: Engine, number: int) -> list[int]:
    """Return the ``number`` of every rank, in rank order."""
    world = engine.world
    if world.size == 1:
        return [number]
    row = np.zeros(world.size, np.int64)
    row[world.rank] = number
    return engine.sum(row).tolist()


def all_reduce_max(engine: Engine, number: int) -> int:
    """Return the maximum of ``number`` over the ranks; for flags 0 and 1, this is a logical or."""
    return max(all_gather(engine, number))


def gather_strings(engine: Engine, texts: Sequence[str]) -> list[list[str]]:
    """Return the ``texts`` of every rank, in rank order; only lengths are sent if there are no texts."""
    if engine.world.size == 1:
        return [list(texts)]
    own = json.dumps(list(texts)).encode() if texts else b""
    ends = np.cumsum(all_gather(engine, len(own)))
    if not ends[-1]:
        return [[] for _ in ends]
    characters = np.zeros(ends[-1], np.int64)
    end = ends[engine.world.rank]
    characters[end - len(own) : end] = np.frombuffer(own, np.uint8)
    parts = np.split(engine.sum(characters).astype(np.uint8), ends[:-1])
    return [json.loads(part.tobytes()) if len(part) else [] for part in parts]


def check_same(engine: Engine, values: Mapping[str, str]) -> None:
    """Raise `OcrnetError` on every rank if a value differs between the ranks.

    ``values`` contains the values by subject, such as ``checkpoint``; the subjects must be the same on all ranks. The
    error message lists each value with its ranks.
    """
    values_of_ranks = [json.loads(text) for (text,) in gather_strings(engine, [json.dumps(dict(values))])]
    for subject in values:
        ranks_of: dict[str, list[int]] = {}
        for rank, rank_values in enumerate(values_of_ranks):
            ranks_of.setdefault(rank_values[subject], []).append(rank)
        if len(ranks_of) > 1:
            groups = "; ".join(f"{_format_ranks(ranks)}: {text}" for text, ranks in ranks_of.items())
            raise OcrnetError(
                f"the ranks do not have the same {subject} ({groups}); run the same command with the same files on all "
                "ranks; on several machines, use a shared file system, and wait until new files are visible on all"
            )


@contextlib.contextmanager
def propagate_errors(engine: Engine) -> Iterator[None]:
    """Raise on every rank if the enclosed code fails on any rank.

    A failing rank raises its own exception. Every other rank raises an `OcrnetError` that names the failing ranks. The
    enclosed code may differ between ranks, but must not contain a collective.
    """
    if engine.world.size == 1:
        yield
        return
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # report the original failure, not that of the exchange
            all_gather(engine, 1)
        raise
    failed = [rank for rank, flag in enumerate(all_gather(engine, 0)) if flag]
    if failed:
        raise OcrnetError(f"{_format_ranks(failed)} failed; see the error message of that rank")


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
