"""The MLflow experiment that a run belongs to: found by its id or its name, made if it does not exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cluster.tracking.config import ExperimentKey

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

KIND_TAG = "mlflow.experimentKind"
KIND = "custom_model_development"
"""An experiment of model training, not of GenAI. MLflow 3.17's own pages no longer look at it: there the browser's
switch decides, and the address, see `cluster.tracking.mlflow_sink.TRAINING_PAGES`."""


class NoExperimentError(Exception):
    """The server has no experiment of this id, or two names were given for it."""


def find_experiment(client: MlflowClient, key: ExperimentKey) -> Experiment | None:
    """The experiment, which may be deleted; None if no experiment has that name.

    Raises
    ------
    NoExperimentError
        No experiment has that id, or the one of that name has another.
    """
    if key.name is None:
        assert key.id is not None
        from mlflow.exceptions import MlflowException

        try:
            return client.get_experiment(key.id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise NoExperimentError(f"no experiment has the id {key.id}") from error
    found = client.get_experiment_by_name(key.name)
    if key.id is not None and (found is None or found.experiment_id != key.id):
        other = "does not exist" if found is None else f"has the id {found.experiment_id}"
        raise NoExperimentError(f"expected experiment {key.name!r} to have the id {key.id}, but it {other}")
    return found


def make_experiment(client: MlflowClient, name: str, artifact_folder: Path | None = None) -> Experiment:
    """The experiment of that name; made here, or by another job at the same moment.

    artifact_folder: holds a folder for the artifacts of each experiment; None leaves it to the server.
    """
    from mlflow.exceptions import MlflowException

    location = (artifact_folder / _folder_name(name)).as_uri() if artifact_folder else None
    try:
        client.create_experiment(name, location, {KIND_TAG: KIND})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.get_experiment_by_name(name)
    if found is None:
        raise NoExperimentError(f"experiment {name!r} is gone after it was made")
    return found


def mark_experiment(client: MlflowClient, experiment: Experiment) -> None:
    """Make it one of model training, unless somebody has said what it is; fails if this user may not write to it."""
    client.set_experiment_tag(experiment.experiment_id, KIND_TAG, experiment.tags.get(KIND_TAG, KIND))


def _folder_name(experiment: str) -> str:
    """The name of one folder for an experiment of any name."""
    dots = not experiment.strip(".")
    return experiment.replace(".", "%2E") if dots else quote(experiment, safe=" ", errors="replace")
