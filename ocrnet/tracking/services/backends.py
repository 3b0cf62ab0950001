"""The services, each with the same five names. Only the process that speaks to one imports its library."""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

# What MLflow takes in one request, and of one parameter.
PARAMS_AT_ONCE, PARAM_LENGTH = 100, 500


class Service(Protocol):
    """A run there: begun, or, where its ``known`` id is given, gone on with. Errors are the library's own."""

    id: str
    where: str  # what to tell the user: where it is to be seen

    def __init__(
        self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any], known: str | None
    ) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of these curves."""

    def picture(self, path: Path, step: int) -> None:
        """Add a picture, a PNG file."""

    def close(self, ending: str) -> None:
        """Send what is left, and say how the run ended: finished, stopped or failed."""


class Wandb:
    """Weights & Biases: project and run; offline files lie in the run's folder, below ``wandb/``."""

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
            # Nothing of the screen, no code; the load that it draws is the training process's.
            settings=wandb.Settings(console="off", disable_code=True, x_stats_pid=os.getppid()),
        )
        offline = self._run.offline
        self.where = f"offline; send it with: wandb sync {self._run.dir.removesuffix('files')}" if offline else ""
        self.where = self.where or f"run {self._run.url}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of these curves."""
        self._run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture, a PNG file."""
        self._run.log({f"samples/{path.stem}": self._wandb.Image(str(path))}, step=step)

    def close(self, ending: str) -> None:
        """Send what is left, and say how the run ended."""
        self._run.finish(exit_code=int(ending == "failed"))


class Mlflow:
    """MLflow: experiment and run, at MLFLOW_TRACKING_URI."""

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
            except MlflowException as error:  # another server, or it was removed there: begin anew
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
        """Add a point to each of these curves."""
        now = round(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def picture(self, path: Path, step: int) -> None:
        """Add a picture, a PNG file."""
        self._client.log_artifact(self.id, str(path), f"samples/step_{step}")

    def close(self, ending: str) -> None:
        """Say how the run ended; everything is sent already."""
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.id, status=states[ending])


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow}
