"""The services behind one interface; only the process that serves one imports its library."""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

# MLflow's limits: parameters per request, and characters per parameter value.
PARAMS_AT_ONCE, PARAM_LENGTH = 100, 500


class Service(Protocol):
    """A run at a service: created, or continued if its ``known`` id is given; errors are the library's own."""

    id: str
    where: str  # text for the user: where to find the run

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], known: str | None
    ) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""

    def picture(self, path: Path, step: int) -> None:
        """Add a picture from a PNG file."""

    def close(self, ending: str) -> None:
        """Send the remaining data and the run's ending: finished, stopped or failed."""


class Wandb:
    """A Weights & Biases run in a project; offline files are in ``wandb/`` in the run's folder."""

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], known: str | None
    ) -> None:
        import wandb

        self._wandb = wandb
        self.id = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            name=os.environ.get("WANDB_NAME") or run_name,
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=dict(settings),
            # Record neither screen output nor code; measure the system load of the training process.
            settings=wandb.Settings(console="off", disable_code=True, x_stats_pid=os.getppid()),
        )
        offline = self._run.offline
        self.where = f"offline; upload it with: wandb sync {self._run.dir.removesuffix('files')}" if offline else ""
        self.where = self.where or f"run {self._run.url}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""
        self._run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture from a PNG file."""
        self._run.log({f"samples/{path.stem}": self._wandb.Image(str(path))}, step=step)

    def close(self, ending: str) -> None:
        """Send the remaining data and the run's ending."""
        self._run.finish(exit_code=int(ending == "failed"))


class Mlflow:
    """An MLflow run in an experiment, at MLFLOW_TRACKING_URI."""

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], known: str | None
    ) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.id = ""
        if known:
            try:
                self._client.update_run(known, status="RUNNING")
                self.id = known
            except MlflowException as error:  # another server, or the run was removed there: create a new run
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if not self.id:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            self.id = self._client.create_run(experiment, run_name=run_name).info.run_id
            params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in settings.items()]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                self._client.log_batch(self.id, params=params[first : first + PARAMS_AT_ONCE])
        self.where = f"run {self.id} of experiment {project} at {self._client.tracking_uri}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve in ``values``."""
        now = round(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture from a PNG file."""
        self._client.log_artifact(self.id, str(path), f"samples/step_{step}")

    def close(self, ending: str) -> None:
        """Send the run's ending; all other data are already sent."""
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.id, status=states[ending])


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow}
