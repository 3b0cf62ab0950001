"""The tracking services behind one interface; their libraries are imported only in `process`."""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

# MLflow's limits: parameters per request, and characters per parameter value.
PARAMS_PER_REQUEST, PARAM_LENGTH = 100, 500


class Service(Protocol):
    """A run in a service: a new one, or with ``run_id`` an earlier one, which is continued.

    ``settings`` are the run's config as pairs of key and value. Methods raise the exceptions of the library.
    """

    id: str
    location: str  # a log line: the url of the run, or how to upload it

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], run_id: str | None
    ) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""

    def image(self, path: Path, step: int) -> None:
        """Add an image from a PNG file."""

    def close(self, ending: str) -> None:
        """Send the remaining data and the run's ending: ``finished``, ``stopped`` or ``failed``."""


class Wandb:
    """A Weights & Biases run in a project; in offline mode, its files are in ``wandb/`` in the run's folder."""

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        import wandb

        self._wandb = wandb
        self.id = run_id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            name=os.environ.get("WANDB_NAME") or run_name,
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=dict(settings),
            # Do not record console output and code; measure the system load of the training process.
            settings=wandb.Settings(console="off", disable_code=True, x_stats_pid=os.getppid()),
        )
        offline = self._run.offline
        self.location = f"offline; upload it with: wandb sync {self._run.dir.removesuffix('files')}" if offline else ""
        self.location = self.location or f"run {self._run.url}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""
        self._run.log(dict(values), step=step)

    def image(self, path: Path, step: int) -> None:
        """Add an image from a PNG file."""
        self._run.log({f"samples/{path.stem}": self._wandb.Image(str(path))}, step=step)

    def close(self, ending: str) -> None:
        """Send the remaining data and the run's ending."""
        self._run.finish(exit_code=int(ending == "failed"))


class Mlflow:
    """An MLflow run in an experiment, at MLFLOW_TRACKING_URI."""

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.id = ""
        if run_id:
            try:
                self._client.update_run(run_id, status="RUNNING")
                self.id = run_id
            except MlflowException as error:  # another server, or the run was deleted: create a new run
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if not self.id:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            self.id = self._client.create_run(experiment, run_name=run_name).info.run_id
            params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in settings.items()]
            for first in range(0, len(params), PARAMS_PER_REQUEST):
                self._client.log_batch(self.id, params=params[first : first + PARAMS_PER_REQUEST])
        self.location = f"run {self.id} of experiment {project} at {self._client.tracking_uri}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""
        now = round(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def image(self, path: Path, step: int) -> None:
        """Add an image from a PNG file."""
        self._client.log_artifact(self.id, str(path), f"samples/step_{step}")

    def close(self, ending: str) -> None:
        """Send the run's ending; `scalars` and `image` have already sent all other data."""
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.id, status=states[ending])


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow}
