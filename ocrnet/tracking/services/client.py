"""The training run's client for a tracking service, Weights & Biases or MLflow.

The library of each service runs in a separate process (`ocrnet.tracking.services.process`). Therefore it cannot block
or end the run, even if it waits for a server, crashes or does not exit.
"""

import contextlib
import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError

logger = logging.getLogger(__name__)

# The package that each service needs, and the command that installs it.
PACKAGES = {"wandb": "pip install wandb", "mlflow": "pip install mlflow"}

# Environment variables whose values must not appear in a message, a log or a service.
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")

# Time limits in seconds: until a service is ready at the first start, until a reply while messages are pending, and for
# sending the remaining data at the end of a run.
START_SECONDS, SILENT_SECONDS, FINISH_SECONDS = 60.0, 300.0, 30.0


def check(names: Sequence[str]) -> None:
    """Raise `OcrnetError` if the package of a chosen service is not installed; do not import it."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder with this name is not the package
            raise OcrnetError(f"trackers: {name} is not installed: {PACKAGES[name]}; or remove it from trackers")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the floating-point values of a row of metrics.jsonl, by the curve names ``KIND/NAME``."""
    return {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}


def scrub(text: str) -> str:
    """Return the text with asterisks in place of the secrets of the environment and the credentials in urls."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        if len(secret) >= 4:
            # mutation: scrub-tracker-messages
            text = text.replace(secret, "***")
    return urls.scrub(text)


class ServiceClient:
    """Sends a run's metrics and images to one service.

    Only `wait_until_ready` and `close` block, each with a time limit. ``folder`` is the run's folder, whose config.yml
    is sent. If the service fails or does not respond, this is logged once, and
    nothing more is sent.
    """

    def __init__(self, name: str, folder: Path, *, project: str, run_name: str) -> None:
        self.name = name
        self._sent = self._done = 0
        self._waiting_since = time.monotonic()
        self._ready, self._ended, self._partial_reply, self._failure = False, False, b"", ""
        log = folder / "logs" / f"{name}.log"
        root = str(Path(__file__).parents[3])  # so that the process imports the same ocrnet
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with log.open("a", encoding="utf-8") as file:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-m", "ocrnet.tracking.services.process", name, str(folder), project, run_name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C does not reach the process; `_kill` kills its group
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests_fd, self._replies_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        # mutation: never-wait-for-tracker-pipe
        os.set_blocking(self._requests_fd, False)
        os.set_blocking(self._replies_fd, False)

    def wait_until_ready(self) -> None:
        """Wait until the service is ready; raise `OcrnetError` if it cannot start.

        It may end the run here, because no training step is lost yet.
        """
        end = time.monotonic() + START_SECONDS
        while not self._ready and self._read_replies(end - time.monotonic()):
            pass
        if not self._ready:
            timeout = "its process has ended" if self._ended else f"no reply within {START_SECONDS:.0f} s"
            failure = scrub(self._failure or timeout)
            self._kill()
            offline = "work offline (WANDB_MODE=offline)" if self.name == "wandb" else "check MLFLOW_TRACKING_URI"
            raise OcrnetError(f"trackers: {self.name} cannot start: {failure}; {offline}, or remove it from trackers")

    def record(self, row: Mapping[str, Any]) -> None:
        """Send the floating-point values of a row of metrics.jsonl."""
        self._send({"kind": row["kind"], "step": row["step"], "scalars": scalars(row)})

    def image(self, path: Path, step: int) -> None:
        """Send the path of an image file in the run's folder; the process uploads it."""
        self._send({"kind": "picture", "step": step, "path": str(path)})

    def close(self, ending: str) -> None:
        """Send the run's ending, ``finished``, ``stopped`` or ``failed``; wait at most `FINISH_SECONDS` for replies."""
        self._send({"kind": "end", "ending": ending})
        end = time.monotonic() + FINISH_SECONDS
        while self._process is not None and self._read_replies(end - time.monotonic()):
            pass
        if self._process is None:
            return
        if self._done < self._sent:
            self._failure = self._failure or f"not all data was sent within {FINISH_SECONDS:.0f} s"
        self._kill()
        if self._failure:
            logger.warning(f"{self.name}: {scrub(self._failure)}; metrics.jsonl has all data")

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        while self._read_replies(0):
            pass
        now = time.monotonic()
        if self._done == self._sent:
            self._waiting_since = now
        # mutation: give-up-silent-tracker
        elif now - self._waiting_since > SILENT_SECONDS:
            self._failure = self._failure or f"no reply for {SILENT_SECONDS:.0f} s"
        try:
            if not self._failure:
                line = json.dumps(message).encode() + b"\n"
                self._sent += 1
                if os.write(self._requests_fd, line) == len(line):
                    return
                self._failure = "it no longer accepts data"
        except BlockingIOError:
            self._failure = "it no longer accepts data"
        except BrokenPipeError:
            self._failure = "its process has ended"
        self._kill()
        logger.warning(f"{self.name}: {scrub(self._failure)}; switched off, metrics.jsonl has all data")

    def _read_replies(self, seconds: float) -> bool:
        """Read replies, waiting at most ``seconds``; return False if there are none, or if the process has ended."""
        if seconds < 0 or not select.select([self._replies_fd], [], [], seconds)[0]:
            return False
        data = os.read(self._replies_fd, 65536)
        *lines, self._partial_reply = (self._partial_reply + data).split(b"\n")
        for line in lines:
            self._handle_reply(json.loads(line))
        self._ended = not data
        if self._ended and not self._failure and self._done < self._sent:
            self._failure = "its process has ended"
        return not self._ended

    def _handle_reply(self, reply: dict[str, Any]) -> None:
        self._ready |= "ready" in reply
        if "done" in reply:
            self._done, self._waiting_since = reply["done"], time.monotonic()
        if "line" in reply:
            logger.info(f"{self.name}: {scrub(reply['line'])}")
        self._failure = self._failure or reply.get("error", "")

    def _kill(self) -> None:
        """Kill the process and its group, and close the pipes."""
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
