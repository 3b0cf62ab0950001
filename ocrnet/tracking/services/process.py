"""The process that serves one tracking service.

It receives the run's messages as JSON lines and replies to each with one JSON line.
"""

import contextlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ocrnet.config import flat
from ocrnet.tracking.services.backends import SERVICES
from ocrnet.tracking.services.client import scrub

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Seconds between checks that the run's process is alive: its data loader workers may keep the pipe open.
LOOK_SECONDS = 2.0


def main() -> int:
    """Serve one run until it ends, however it ends; return the exit status."""
    name, folder, project, run_name = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    answers = os.dup(1)
    os.dup2(2, 1)  # the library's output goes to the log
    messages = os.dup(0)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)  # the library cannot prompt for input
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run also gets them, and then sends its ending

    def answer(**what: object) -> None:
        # mutation: tracker-survives-killed-run
        with contextlib.suppress(BrokenPipeError):  # the run is gone: messages already read still go to the service
            os.write(answers, json.dumps(what).encode() + b"\n")

    try:
        _serve(name, folder, (project, run_name), messages, answer)
    except Exception as error:  # of any type: the run gets it, and only this process ends
        print(scrub(traceback.format_exc()), file=sys.stderr, flush=True)
        answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        return 1
    return 0


def _serve(name: str, folder: Path, names: tuple[str, str], messages: int, answer: Any) -> None:
    place = folder / "logs" / f"{name}.json"  # the run's id at the service, and the last steps that were sent
    lock = (folder / "logs" / f".{name}.lock").open("a")
    if fcntl is not None:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # the process of an interrupted run may still be sending
    known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    settings = dict(flat(yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))))
    service = SERVICES[name](folder, names[0], names[1], settings, known.get("id"))
    if service.id != known.get("id"):
        known = {"id": service.id}
        _keep(place, known)
    answer(ready=True)
    answer(say=service.where)
    done = 0
    ending = "failed"
    for message in _messages(messages):
        kind, step = message["kind"], message.get("step", 0)
        if kind == "end":
            ending = message["ending"]
            break
        # mutation: send-rows-to-trackers-once
        if step > known.get("eval" if kind == "picture" else kind, -1):
            if kind == "picture":
                service.picture(Path(message["path"]), step)
            else:
                service.scalars(message["scalars"], step)
                known[kind] = step
                _keep(place, known)
        done += 1
        answer(done=done)
    service.close(ending)
    answer(done=done + 1)


def _messages(source: int) -> Iterator[dict[str, Any]]:
    """Yield the run's messages until the run closes the pipe or its process is gone."""
    run, rest = os.getppid(), b""
    while os.getppid() == run:
        if not select.select([source], [], [], LOOK_SECONDS)[0]:
            continue
        some = os.read(source, 65536)
        if not some:
            return
        *lines, rest = (rest + some).split(b"\n")
        yield from map(json.loads, lines)


def _keep(place: Path, known: dict[str, Any]) -> None:
    draft = place.with_suffix(".tmp")
    draft.write_text(json.dumps(known), encoding="utf-8")
    os.replace(draft, place)


if __name__ == "__main__":
    sys.exit(main())
