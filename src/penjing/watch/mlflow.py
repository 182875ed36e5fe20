"""MLflow: a run in an experiment of a tracking server, or of a database file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from penjing.watch.tracker import ANSWER_S, check_server, environment, package, safe_name, unreachable, within

EXPERIMENT = "penjing"
_BATCH = 100  # parameters that MLflow takes at once
_PARAMETER, _TAG = 500, 5000  # characters; older servers take no more
# By default a server that went away is waited for over several minutes, at every call.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where results stand
}
_LOCAL = ("sqlite:", "file:")


class MLflow:
    """A tracking URI such as ``sqlite:///mlflow.db`` or ``http://127.0.0.1:5000``.

    The experiment is ``penjing``, or what the environment variable MLFLOW_EXPERIMENT_NAME says.

    Raises:
        MissingDependency: The package is not installed.
        OutputError: The URI is none of MLflow's, or nothing answers there within ten seconds.
    """

    def __init__(self, where: str) -> None:
        client = package("mlflow.tracking", "mlflow").MlflowClient
        remedy = "mlflow:sqlite:///mlflow.db writes a file; `mlflow server` starts a server"
        try:
            local = where.startswith(_LOCAL) or "://" not in where
            with environment(_SETTINGS):
                opened = _opened(client, where) if local else within(ANSWER_S, lambda: _answering(client, where))
            self._client, self._experiment = opened
        except ModuleNotFoundError as error:  # a database needs more than mlflow-skinny brings along
            raise unreachable(where, error, f"pip install {error.name or 'mlflow'}") from None
        except Exception as error:  # MLflow's own, those of its database, of the network
            raise unreachable(where, error, remedy) from None
        self._run = ""

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Begin a run in the experiment."""
        from mlflow.entities import Param

        with environment(_SETTINGS):
            tags = {"mlflow.source.name": "penjing"}
            self._run = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
            rows = iter(Param(safe_name(key), str(value)[:_PARAMETER]) for key, value in parameters.items())
            while batch := list(islice(rows, _BATCH)):
                self._client.log_batch(self._run, params=batch)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        with environment(_SETTINGS):
            rows = [Metric(safe_name(name), value, now, step) for name, value in values.items()]
            self._client.log_batch(self._run, metrics=rows)

    def texts(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        with environment(_SETTINGS):
            rows = [RunTag(safe_name(name), text[:_TAG]) for name, text in values.items()]
            self._client.log_batch(self._run, tags=rows)

    def end(self, failure: str | None) -> None:
        """End the run: finished, or failed."""
        if failure is not None:
            self.texts({"failure": failure})
        with environment(_SETTINGS):
            self._client.set_terminated(self._run, "FINISHED" if failure is None else "FAILED")


def _answering(client: Any, where: str) -> tuple[Any, str]:
    """The same, of a server that is asked first whether it is there: MLflow asks again and again."""
    if where.startswith(("http://", "https://")):
        check_server(where)
    return _opened(client, where)


def _opened(client: Any, where: str) -> tuple[Any, str]:
    """A client, and the identifier of the experiment, which is made where there is none."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    opened = client(tracking_uri=where)
    experiment = opened.get_experiment_by_name(name)
    if experiment is None:
        return opened, str(opened.create_experiment(name))
    if experiment.lifecycle_stage != "active":
        raise ValueError(f"the experiment {name!r} is deleted there: restore it, or set MLFLOW_EXPERIMENT_NAME")
    return opened, str(experiment.experiment_id)


open_tracker = MLflow
