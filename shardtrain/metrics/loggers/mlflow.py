"""`log.also: [mlflow]`: MLflow.

Into `mlflow.db` beside the run directory, unless the variable `MLFLOW_TRACKING_URI` names a server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from shardtrain.host.files import write_text
from shardtrain.metrics.logger import LoggedRun, required

#: Without which a run with this logger does not start.
PACKAGE = "mlflow"
_EXPERIMENT = "shardtrain"
_LONGEST = 500  # characters of a parameter


class MlflowLogger:
    """One run of MLflow.

    Args:
      mlflow: the package.
      client: of its server or folder.
      run: the id of the run there.
    """

    def __init__(self, mlflow: Any, client: Any, run: str):
        self._mlflow, self._client, self._run = mlflow, client, run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text as a file."""
        self._client.log_text(self._run, text, f"{name}.txt")

    def forget_from(self, step: int) -> None:
        """Do nothing: the later values of a step are shown."""

    def flush(self) -> None:
        """Do nothing: every call writes."""

    def close(self) -> None:
        """End the run; a resumed run continues it."""
        self._client.set_terminated(self._run)


def open_logger(run: LoggedRun) -> MlflowLogger:
    """Start a run of MLflow, or go on with the one of this directory."""
    mlflow = required(PACKAGE)
    beside = run.directory.parent
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{beside / 'mlflow.db'}"))
    file = run.directory / "mlflow.id"
    if not file.exists():
        found = client.get_experiment_by_name(_EXPERIMENT)
        files = None if "MLFLOW_TRACKING_URI" in os.environ else (beside / "mlartifacts").as_uri()
        experiment = client.create_experiment(_EXPERIMENT, files) if found is None else found.experiment_id
        made = client.create_run(experiment, run_name=run.name).info.run_id
        for key, value in _flat(run.config, ""):
            client.log_param(made, key, str(value)[:_LONGEST])
        write_text(file, made)
    return MlflowLogger(mlflow, client, file.read_text())


def _flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
