"""The run's side of a tracking service, Weights & Biases or MLflow.

Each service runs in a separate process (`ocrnet.tracking.services.process`). Whatever its library does (wait for a
server, use memory, crash, not exit), it neither blocks nor ends the run.
"""

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError

# The package that each service needs, and the command that installs it.
PACKAGES = {"wandb": "pip install wandb", "mlflow": "pip install mlflow"}

# Environment variables whose values must not appear in a message, a log or a service.
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")

# Time limits in seconds: for a service to become ready at the first start, for a reply while messages are pending, and
# for the wait at the end of a run.
START_SECONDS, SILENT_SECONDS, FINISH_SECONDS = 60.0, 300.0, 30.0


def check(names: Sequence[str]) -> None:
    """Raise `OcrnetError` if the package of a chosen service is not installed; do not import it."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder that only has the name is not the package
            raise OcrnetError(f"trackers: {name} is not installed: {PACKAGES[name]}; or remove it from trackers")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the curve values of a row of metrics.jsonl: its floats, named ``kind/name``."""
    return {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}


def scrub(text: str) -> str:
    """Return the text with the secrets from the environment and credentials in urls replaced."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        if len(secret) >= 4:
            # mutation: scrub-tracker-messages
            text = text.replace(secret, "***")
    return urls.scrub(text)


class ServiceClient:
    """The training run's client for one service; only `wait_until_ready` and `close` block, each with a time limit.

    ``folder`` is the run's folder, whose config.yml is sent. ``say`` receives each line to log. A service that
    fails or does not respond is reported once and then switched off.
    """

    def __init__(self, name: str, folder: Path, *, project: str, run_name: str, say: Callable[[str], None]) -> None:
        self.name, self._say = name, say
        self._sent = self._done = 0
        self._waits_since = time.monotonic()
        self._ready, self._ended, self._rest, self._trouble = False, False, b"", ""
        log = folder / "logs" / f"{name}.log"
        root = str(Path(__file__).parents[3])  # the process must import this same package
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with log.open("a", encoding="utf-8") as file:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-m", "ocrnet.tracking.services.process", name, str(folder), project, run_name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches only the run; the process group can be killed as a whole
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        # mutation: never-wait-for-tracker-pipe
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def wait_until_ready(self) -> None:
        """Wait until the service is ready; raise `OcrnetError` if it cannot begin.

        An error is acceptable here, because nothing is lost before the first step.
        """
        end = time.monotonic() + START_SECONDS
        while not self._ready and self._listen(end - time.monotonic()):
            pass
        if not self._ready:
            silent = "its process has ended" if self._ended else f"no reply within {START_SECONDS:.0f} s"
            why = scrub(self._trouble or silent)
            self._end()
            offline = "work offline (WANDB_MODE=offline)" if self.name == "wandb" else "check MLFLOW_TRACKING_URI"
            raise OcrnetError(f"trackers: {self.name} cannot start: {why}; {offline}, or remove it from trackers")

    def record(self, row: Mapping[str, Any]) -> None:
        """Send the curves of a row of metrics.jsonl."""
        self._send({"kind": row["kind"], "step": row["step"], "scalars": scalars(row)})

    def picture(self, path: Path, step: int) -> None:
        """Send the path of a picture in the run's folder."""
        self._send({"kind": "picture", "step": step, "path": str(path)})

    def close(self, ending: str) -> None:
        """Send the run's ending (finished, stopped or failed); wait up to `FINISH_SECONDS` until all is sent."""
        self._send({"kind": "end", "ending": ending})
        end = time.monotonic() + FINISH_SECONDS
        while self._process is not None and self._listen(end - time.monotonic()):
            pass
        if self._process is None:
            return
        if self._done < self._sent:
            self._trouble = self._trouble or f"not all data was sent within {FINISH_SECONDS:.0f} s"
        self._end()
        if self._trouble:
            self._say(f"{self.name}: {scrub(self._trouble)}; metrics.jsonl has all data")

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        while self._listen(0):
            pass
        now = time.monotonic()
        if self._done == self._sent:
            self._waits_since = now
        # mutation: give-up-silent-tracker
        elif now - self._waits_since > SILENT_SECONDS:
            self._trouble = self._trouble or f"no reply for {SILENT_SECONDS:.0f} s"
        try:
            if not self._trouble:
                line = json.dumps(message).encode() + b"\n"
                self._sent += 1
                if os.write(self._to, line) == len(line):
                    return
                self._trouble = "it no longer accepts data"
        except BlockingIOError:
            self._trouble = "it no longer accepts data"
        except BrokenPipeError:
            self._trouble = "its process has ended"
        self._end()
        self._say(f"{self.name}: {scrub(self._trouble)}; switched off, metrics.jsonl has all data")

    def _listen(self, seconds: float) -> bool:
        """Read replies, waiting at most ``seconds``; return False if there are none or the process has ended."""
        if seconds < 0 or not select.select([self._from], [], [], seconds)[0]:
            return False
        some = os.read(self._from, 65536)
        *lines, self._rest = (self._rest + some).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        self._ended = not some
        if self._ended and not self._trouble and self._done < self._sent:
            self._trouble = "its process has ended"
        return not self._ended

    def _take(self, answer: dict[str, Any]) -> None:
        self._ready |= "ready" in answer
        if "done" in answer:
            self._done, self._waits_since = answer["done"], time.monotonic()
        if "say" in answer:
            self._say(f"{self.name}: {scrub(answer['say'])}")
        self._trouble = self._trouble or answer.get("error", "")

    def _end(self) -> None:
        """Kill the process and all processes in its group."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
