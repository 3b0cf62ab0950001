"""The folder of a run: its config, its log and its measurements. Only rank 0 writes."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ocrnet import config
from ocrnet.config import Config
from ocrnet.data.image_io import write_png
from ocrnet.tracking.services import client
from ocrnet.tracking.services.client import ServiceClient
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.version import __version__

if TYPE_CHECKING:
    from ocrnet.tracking.tensorboard import TensorBoardWriter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("numpy", "opencv-python-headless", "pillow", "safetensors")


class Run:
    """Writes log lines to the screen and ``logs/``, and measurements to ``metrics.jsonl``.

    Checkpoints belong in ``checkpoint/``. Pictures go to ``samples/`` and ``curves.png``. Measurements and sample
    pictures also go to ``tensorboard/`` and to services, if these are opened.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0, name: str = "train") -> None:
        self.folder, self.writes = Path(folder), rank == 0
        self.checkpoints = self.folder / "checkpoint"
        self.metrics = self.folder / ("metrics.jsonl" if name == "train" else f"{name}.jsonl")
        self.log = self.folder / "logs" / f"{name}.log"
        self._tensorboard = self.folder / "tensorboard"
        self._board: TensorBoardWriter | None = None
        self._services: list[ServiceClient] = []
        if self.writes:
            self._make_folder(self.log.parent)

    def claim(self) -> None:
        """Lock the folder until this process ends, however it ends; raise `OcrnetError` if another run has locked it.

        The lock is a record lock, which data loader workers do not inherit. Therefore a killed run can be resumed at
        once. Windows has no lock.
        """
        if not self.writes or fcntl is None:
            return
        path = self.folder / ".lock"
        with _writing(path):
            self._lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise OcrnetError(
                f"save_dir '{self.folder}' is in use by another run ({self._lock.read().strip()}); "
                "wait for it, stop it, or give another --save_dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock.flush()

    def say(self, line: str) -> None:
        """Print a line and append it to the log."""
        if not self.writes:
            return
        try:
            print(line, flush=True)
        except OSError:  # the terminal or the pipe is closed; the log continues
            redirect_stdout_to_devnull()
        self._append(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one JSON row to metrics.jsonl; send its floats to TensorBoard and the services."""
        if not self.writes:
            return
        self._append(self.metrics, json.dumps(row, allow_nan=False))
        if self._board is not None:
            with _writing(self._tensorboard):
                for name, value in client.scalars(row).items():
                    self._board.scalar(name, value, row["step"])
                self._board.flush()
        for sink in self._services:
            sink.record(row)

    def sample(self, name: str, step: int, picture: np.ndarray) -> None:
        """Save a picture of a prediction after ``step``; send it to TensorBoard and the services.

        Args:
            name: The image's name; each ``/`` becomes ``_``.
            step: The number of completed steps.
            picture: uint8 H,W,3 RGB.

        Raises:
            OcrnetError: A file cannot be written.
        """
        name = name.replace("/", "_")
        path = self.folder / "samples" / f"step_{step}" / f"{name}.png"
        write_png(path, picture)
        if self._board is not None:
            with _writing(self._tensorboard):
                self._board.image(f"samples/{name}", picture, step)
        for sink in self._services:
            sink.picture(path, step)

    def draw_curves(self) -> None:
        """Draw metrics.jsonl as curves.png."""
        if self.writes and self.metrics.exists():
            picture = self.folder / "curves.png"
            with _writing(picture):
                from ocrnet.tracking import plots

                plots.draw(self.metrics, picture)

    def open_board(self, step: int) -> None:
        """Write to TensorBoard from now on; TensorBoard drops the points of an earlier start after ``step``."""
        if self.writes:
            from ocrnet.tracking.tensorboard import (
                TensorBoardWriter,  # imported late, as plots above: the import takes more than 0.5 s
            )

            with _writing(self._tensorboard):
                self._board = TensorBoardWriter(self._tensorboard, step)

    def open_services(self, names: Sequence[str], *, project: str, run_name: str, fresh: bool) -> None:
        """Start the clients of the services, which send the measurements; call it after `begin`.

        Args:
            names: The services.
            project: The project at the service.
            run_name: The run's name at the service; empty means the name of the folder.
            fresh: Create a new run at each service and wait until the services are ready. Otherwise, continue the
                earlier run and do not wait.

        Raises:
            OcrnetError: The run is fresh and a service cannot begin.
        """
        if not self.writes:
            return
        for name in names:
            if fresh:
                (self.folder / "logs" / f"{name}.json").unlink(missing_ok=True)
            run_name = run_name or self.folder.resolve().name
            self._services.append(ServiceClient(name, self.folder, project=project, run_name=run_name, say=self.say))
        for sink in self._services if fresh else ():
            sink.wait_until_ready()

    def close(self, ending: str = "failed") -> None:
        """Flush and close TensorBoard and the services; ``ending`` is finished, stopped or failed."""
        closing, self._services = self._services, []
        for sink in closing:
            sink.close(ending)
        if self._board is not None:
            board, self._board = self._board, None
            with _writing(self._tensorboard):
                board.close()

    def cut_metrics(self, *, step: int, evaluated_step: int) -> None:
        """Remove the metrics that a run resumed at ``step`` will write again, and a truncated last row.

        Evaluation rows are kept up to ``evaluated_step``, all other rows up to ``step``.
        """
        if not self.writes or not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= (evaluated_step if row["kind"] == "eval" else step):
                kept.append(line + "\n")
        draft = self.metrics.with_suffix(".tmp")
        with _writing(self.metrics):
            draft.write_text("".join(kept), encoding="utf-8")
            os.replace(draft, self.metrics)

    def begin(self, cfg: Config, versions: Mapping[str, str]) -> None:
        """Write ``config.yml``; append this start's time, command, commit and versions to ``starts.jsonl``."""
        if not self.writes:
            return
        self._make_folder(self.checkpoints)
        text = yaml.safe_dump(config.as_dict(cfg), sort_keys=False, default_flow_style=None)
        with _writing(self.folder / "config.yml"):
            (self.folder / "config.yml").write_text(text, encoding="utf-8")
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "commit": git_commit(),
            "versions": dict(versions),
        }
        self._append(self.folder / "starts.jsonl", json.dumps(start))

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OcrnetError(f"save_dir '{self.folder}' cannot be used: {error}; give another --save_dir") from None

    def _append(self, path: Path, line: str) -> None:
        with _writing(path):
            # mutation: recreate-removed-run-folder
            path.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed during the run
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def redirect_stdout_to_devnull() -> None:
    """Redirect stdout to /dev/null, because its reader is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OcrnetError(
            f"'{path}' cannot be written: {why}; make room, then resume with --resume_ckpt auto"
        ) from None


def core_versions() -> dict[str, str]:
    """Return the versions on which a run's numbers depend, except those of its engine."""
    found = {"ocrnet": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"  # e.g. opencv-python in place of opencv-python-headless
    return found


def git_commit() -> str | None:
    """Return the commit of this source tree, with ``-dirty`` if it has changes; None if git gives no commit."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
