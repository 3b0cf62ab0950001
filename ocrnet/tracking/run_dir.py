"""The folder of a run: its config, log, metrics and sample images. Only rank 0 writes."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ocrnet import config
from ocrnet.config import Config
from ocrnet.data.image_io import write_png
from ocrnet.tracking.services import client
from ocrnet.tracking.services.client import ServiceClient
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.files import append_line, translate_write_errors
from ocrnet.utils.version import __version__

if TYPE_CHECKING:
    from ocrnet.tracking.tensorboard import TensorBoardWriter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("numpy", "opencv-python-headless", "pillow", "safetensors")


class Run:
    """Writes the files of a run's folder.

    After `open_log`, the messages of all loggers are appended to ``logs/NAME.log``. Metrics are appended to
    ``metrics.jsonl``, or for another ``name`` than ``train`` to ``NAME.jsonl``. Images of predictions are written to
    ``samples/``. Metrics and these images are also sent to TensorBoard and the tracking services, if these are opened.
    The caller writes checkpoints to ``checkpoint/``.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0, name: str = "train") -> None:
        self.folder, self.writes = Path(folder), rank == 0
        self.checkpoints = self.folder / "checkpoint"
        self.metrics = self.folder / ("metrics.jsonl" if name == "train" else f"{name}.jsonl")
        self.log = self.folder / "logs" / f"{name}.log"
        self._tensorboard_folder = self.folder / "tensorboard"
        self._tensorboard_writer: TensorBoardWriter | None = None
        self._services: list[ServiceClient] = []
        if self.writes:
            self._make_folder(self.log.parent)

    def lock(self) -> None:
        """Lock the folder until this process ends or is killed; raise `OcrnetError` if another run has locked it.

        Data loader workers do not inherit the lock, which is a POSIX record lock. Therefore a killed run can be resumed
        while its workers still run. On Windows, nothing is locked.
        """
        if not self.writes or fcntl is None:
            return
        path = self.folder / ".lock"
        with translate_write_errors(path):
            self._lock_file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.seek(0)
            raise OcrnetError(
                f"save_dir '{self.folder}' is in use by another run ({self._lock_file.read().strip()}); "
                "wait for it, stop it, or give another --save_dir"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock_file.flush()

    def open_log(self) -> None:
        """Append all messages of this package, also earlier ones, to the log file."""
        if self.writes:
            log.open_file(self.log)

    def record(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl as JSON; send its floating-point values to TensorBoard and the services."""
        if not self.writes:
            return
        _append(self.metrics, json.dumps(row, allow_nan=False))
        if self._tensorboard_writer is not None:
            with translate_write_errors(self._tensorboard_folder):
                for name, value in client.scalars(row).items():
                    self._tensorboard_writer.scalar(name, value, row["step"])
                self._tensorboard_writer.flush()
        for service in self._services:
            service.record(row)

    def sample(self, name: str, step: int, image: np.ndarray) -> None:
        """Save an image of a prediction to ``samples/``; send it to TensorBoard and the services.

        Args:
            name: The name of the predicted image; each ``/`` becomes ``_``.
            step: The number of completed steps.
            image: The image to save, uint8 H,W,3 RGB.

        Raises:
            OcrnetError: A file cannot be written.
        """
        name = name.replace("/", "_")
        path = self.folder / "samples" / f"step_{step}" / f"{name}.png"
        write_png(path, image)
        if self._tensorboard_writer is not None:
            with translate_write_errors(self._tensorboard_folder):
                self._tensorboard_writer.image(f"samples/{name}", image, step)
        for service in self._services:
            service.image(path, step)

    def draw_curves(self) -> None:
        """Plot metrics.jsonl and write curves.png."""
        if self.writes and self.metrics.exists():
            path = self.folder / "curves.png"
            with translate_write_errors(path):
                from ocrnet.tracking import plots

                plots.draw(self.metrics, path)

    def open_tensorboard(self, step: int) -> None:
        """Start writing TensorBoard files; TensorBoard discards the points after ``step`` of an earlier start."""
        if self.writes:
            from ocrnet.tracking.tensorboard import (
                TensorBoardWriter,  # imported here, like plots above, because the import takes more than 0.5 s
            )

            with translate_write_errors(self._tensorboard_folder):
                self._tensorboard_writer = TensorBoardWriter(self._tensorboard_folder, step)

    def open_services(self, names: Sequence[str], *, project: str, run_name: str, fresh: bool) -> None:
        """Start sending metrics and sample images to the tracking services; call it after `begin`.

        Args:
            names: The services, ``wandb`` or ``mlflow``.
            project: The project (W&B) or experiment (MLflow).
            run_name: The run's name in the services; empty means the name of the folder.
            fresh: Create a new run in each service and wait until the services are ready. Otherwise, continue the
                earlier run and do not wait.

        Raises:
            OcrnetError: The run is fresh and a service cannot start.
        """
        if not self.writes:
            return
        for name in names:
            if fresh:
                (self.folder / "logs" / f"{name}.json").unlink(missing_ok=True)
            run_name = run_name or self.folder.resolve().name
            self._services.append(ServiceClient(name, self.folder, project=project, run_name=run_name))
        for service in self._services if fresh else ():
            service.wait_until_ready()

    def close(self, ending: str = "failed") -> None:
        """Flush and close TensorBoard and the services; ``ending`` is ``finished``, ``stopped`` or ``failed``."""
        services, self._services = self._services, []
        for service in services:
            service.close(ending)
        if self._tensorboard_writer is not None:
            writer, self._tensorboard_writer = self._tensorboard_writer, None
            with translate_write_errors(self._tensorboard_folder):
                writer.close()

    def truncate_metrics(self, *, step: int, evaluated_step: int) -> None:
        """Remove the rows of metrics.jsonl that a run resumed at ``step`` will write again, and incomplete rows.

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
        temporary = self.metrics.with_suffix(".tmp")
        with translate_write_errors(self.metrics):
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.metrics)

    def begin(self, cfg: Config, versions: Mapping[str, str]) -> None:
        """Write ``config.yml``; append the time, command, commit and versions of this start to ``starts.jsonl``."""
        if not self.writes:
            return
        self._make_folder(self.checkpoints)
        text = yaml.safe_dump(config.as_dict(cfg), sort_keys=False, default_flow_style=None)
        with translate_write_errors(self.folder / "config.yml"):
            (self.folder / "config.yml").write_text(text, encoding="utf-8")
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "commit": git_commit(),
            "versions": dict(versions),
        }
        _append(self.folder / "starts.jsonl", json.dumps(start))

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OcrnetError(f"save_dir '{self.folder}' cannot be used: {error}; give another --save_dir") from None


def _append(path: Path, line: str) -> None:
    with translate_write_errors(path):
        append_line(path, line)


def core_versions() -> dict[str, str]:
    """Return the versions of ocrnet, Python and the packages that affect a run's numbers, without the engine's."""
    versions = {"ocrnet": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"  # e.g. opencv-python in place of opencv-python-headless
    return versions


def git_commit() -> str | None:
    """Return the git commit of this source tree, with ``-dirty`` if it has changes; None outside a git clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
