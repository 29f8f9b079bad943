"""A finished run as a new version of a registered model, and the alias of the best one.

The alias `champion` moves to a version only if that is better than the champion on the same data and with the same
readout: other numbers cannot be compared. Somebody who wants another champion moves the alias by hand. A stream decides
itself which of its candidates is the champion (`RegisterEvent.decided`); the alias follows it on the same data.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cluster.tracking.delivery import RejectedError
from cluster.tracking.events import RegisterEvent
from cluster.tracking.mlflow_model import MODEL_KEY_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
RUN_TAG, DATA_TAG, PROBE_TAG = "simmatch.run", "simmatch.data", "simmatch.probe"
ACCURACY_TAG, CHAMPION_TAG = "simmatch.accuracy", "simmatch.champion"
OWN_TAG = ("simmatch.kind", "similarity matching")
"""Tag of a registered model."""


def open_registered_model(client: MlflowClient, name: str) -> None:
    """Make the registered model if it does not exist; fails if this user may not add versions to it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags=dict([OWN_TAG]))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.set_registered_model_tag(name, *OWN_TAG)


def register(client: MlflowClient, event: RegisterEvent, model: LoggedModel, *, run_link: str | None = None) -> str:
    """Register a logged model once, however often it is called, and decide about the alias. Returns a line about both.

    run_link: of the run's page, for a registry that does not know the run.

    Raises
    ------
    RejectedError
        The registry cannot hold a model of this server.
    """
    from mlflow.exceptions import MlflowException

    open_registered_model(client, event.name)
    try:
        version = _find(client, event, model) or _create(client, event, model, run_link)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RejectedError(str(error)) from error
        raise
    versions = json.dumps([{"name": event.name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})  # the page of the logged model
    decision = version.tags.get(CHAMPION_TAG)
    if decision is None:  # once: somebody may have moved the alias since
        decision = _decide(client, event, version)
        client.set_model_version_tag(event.name, version.version, CHAMPION_TAG, decision)
    return f"registered as {event.name}, version {version.version}; {CHAMPION}: {decision}"


def _find(client: MlflowClient, event: RegisterEvent, model: LoggedModel) -> ModelVersion | None:
    """The version of this run's model; of several, which a request that came late may leave, the first remains."""
    found = client.search_model_versions(f"name = '{event.name}' and tags.`{RUN_TAG}` = '{model.source_run_id}'")
    key = model.tags.get(MODEL_KEY_TAG)
    versions = sorted((v for v in found if v.tags.get(MODEL_KEY_TAG) == key), key=lambda v: int(v.version))
    for version in versions[1:]:
        client.delete_model_version(event.name, version.version)
    return versions[0] if versions else None


def _create(client: MlflowClient, event: RegisterEvent, model: LoggedModel, run_link: str | None) -> ModelVersion:
    tags = {
        RUN_TAG: model.source_run_id,
        MODEL_KEY_TAG: model.tags.get(MODEL_KEY_TAG, ""),
        DATA_TAG: event.data,
        PROBE_TAG: event.probe,
        ACCURACY_TAG: "none" if event.accuracy is None else _as_kept(event.accuracy),
    }
    known = run_link is None
    return client.create_model_version(
        event.name,
        # its files' own place: an id would be looked up at the server of MLflow's global state
        model.artifact_location,
        run_id=model.source_run_id if known else None,
        model_id=model.model_id if known else None,
        run_link=run_link,
        tags=tags,
        description=event.description,
        await_creation_for=0,
    )


def _as_kept(accuracy: float) -> str:
    """Of both versions the same digits are compared: an equal accuracy is not a higher one."""
    return f"{accuracy:.6f}"


def _with(accuracy: float | None) -> str:
    return "" if accuracy is None else f"; accuracy {accuracy:.4f}"


def _decide(client: MlflowClient, event: RegisterEvent, version: ModelVersion) -> str:
    """Move the alias to this version, or leave it; returns why."""
    mine = event.accuracy
    if mine is None and not event.decided:
        return "not considered, no readout was fitted"
    holder = client.get_registered_model(event.name).aliases.get(CHAMPION)
    if holder is None:
        client.set_registered_model_alias(event.name, CHAMPION, version.version)
        return f"this version, the first{_with(mine)}"
    if str(holder) == str(version.version):  # moved by a request whose answer was lost
        return f"this version{_with(mine)}"
    champion = client.get_model_version(event.name, str(holder))
    stays = f"stays version {holder}"
    if event.decided and champion.tags.get(DATA_TAG) == event.data:
        client.set_registered_model_alias(event.name, CHAMPION, version.version)
        return f"moved here from version {holder}: {event.decided}"
    if mine is None:
        return (
            f"{stays}, which was measured with other data: {champion.tags.get(DATA_TAG, 'unknown')}, here {event.data}"
        )
    for tag, value, what in ((DATA_TAG, event.data, "other data"), (PROBE_TAG, event.probe, "another probe")):
        if champion.tags.get(tag) != value:
            return f"{stays}, which was measured with {what}: {champion.tags.get(tag, 'unknown')}, here {value}"
    assert mine is not None
    try:
        theirs = float(champion.tags.get(ACCURACY_TAG, ""))
    except ValueError:
        return f"{stays}, whose accuracy is not known"
    if float(_as_kept(mine)) <= theirs:
        return f"{stays}: its accuracy {theirs:.4f} is not below {mine:.4f}"
    client.set_registered_model_alias(event.name, CHAMPION, version.version)
    return f"moved here from version {holder}: accuracy {mine:.4f}, was {theirs:.4f}"
