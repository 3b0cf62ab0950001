"""The process that sends a run's data to one tracking service.

It reads the run's messages from stdin as JSON lines, and writes a JSON line to stdout for each handled message.
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

# Seconds between checks that the run's process is alive. End-of-file of the pipe is not enough, because data loader
# workers of a killed run may keep the pipe open.
POLL_SECONDS = 2.0


def main() -> int:
    """Send one run's data until the run ends or is killed; return the exit status."""
    name, folder, project, run_name = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    replies_fd = os.dup(1)
    os.dup2(2, 1)  # redirect the library's output to the log file
    requests_fd = os.dup(0)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)  # the library cannot prompt for input
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run receives them too, and then sends the end message

    def reply(**message: object) -> None:
        # mutation: tracker-survives-killed-run
        with contextlib.suppress(BrokenPipeError):  # the run was killed: continue to send the messages already read
            os.write(replies_fd, json.dumps(message).encode() + b"\n")

    try:
        _serve(name, folder, (project, run_name), requests_fd, reply)
    except Exception as error:  # the run receives the error as a reply and continues; only this process ends
        print(scrub(traceback.format_exc()), file=sys.stderr, flush=True)
        reply(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        return 1
    return 0


def _serve(name: str, folder: Path, names: tuple[str, str], requests_fd: int, reply: Any) -> None:
    """Open the run in the service and pass on each message; ``names`` are those of the project and of the run."""
    state_file = folder / "logs" / f"{name}.json"  # the run's id in the service, and the last steps sent
    lock = (folder / "logs" / f".{name}.lock").open("a")
    if fcntl is not None:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # wait: the process of an interrupted run may still be sending
    state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8")) if state_file.exists() else {}
    settings = dict(flat(yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))))
    service = SERVICES[name](folder, names[0], names[1], settings, state.get("id"))
    if service.id != state.get("id"):
        state = {"id": service.id}
        _save_state(state_file, state)
    reply(ready=True)
    reply(line=service.location)
    handled = 0
    ending = "failed"
    for message in _read_messages(requests_fd):
        kind, step = message["kind"], message.get("step", 0)
        if kind == "end":
            ending = message["ending"]
            break
        # mutation: send-rows-to-trackers-once
        if step > state.get("eval" if kind == "picture" else kind, -1):
            if kind == "picture":
                service.image(Path(message["path"]), step)
            else:
                service.scalars(message["scalars"], step)
                state[kind] = step
                _save_state(state_file, state)
        handled += 1
        reply(done=handled)
    service.close(ending)
    reply(done=handled + 1)


def _read_messages(requests_fd: int) -> Iterator[dict[str, Any]]:
    """Yield the run's messages until the run closes the pipe or ends."""
    run, partial = os.getppid(), b""
    while os.getppid() == run:
        if not select.select([requests_fd], [], [], POLL_SECONDS)[0]:
            continue
        data = os.read(requests_fd, 65536)
        if not data:
            return
        *lines, partial = (partial + data).split(b"\n")
        yield from map(json.loads, lines)


def _save_state(state_file: Path, state: dict[str, Any]) -> None:
    """Write the state file atomically."""
    temporary = state_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state), encoding="utf-8")
    os.replace(temporary, state_file)


if __name__ == "__main__":
    sys.exit(main())
