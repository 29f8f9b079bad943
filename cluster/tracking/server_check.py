"""What an MLflow server says to a job before it starts: whether it answers, and whether it takes this job's records."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.redaction import one_line, redact
from cluster.tracking.config import (
    ID_VARIABLE,
    NAME_VARIABLE,
    URI_VARIABLE,
    ExperimentKey,
    TrackingConfig,
    check_model_name,
    resolve_experiment,
    resolve_registry,
    resolve_uri,
)
from cluster.tracking.experiments import NoExperimentError, find_experiment, make_experiment, mark_experiment
from cluster.tracking.mlflow_client import NOT_JSON, database_file, mlflow_settings, open_client
from cluster.tracking.registry import open_registered_model

ANSWER_S = 5.0
"""Longest wait for the server."""

INVALID_HOST = "Invalid Host header"
"""In the answer of a server whose `--allowed-hosts` lacks the name that it was called by."""

BODY, CAUSE = "Response body: ", "(Caused by "
"""Before the server's own words, or the network's, in a message of MLflow's client."""

_OTHER_ID = f"correct ${ID_VARIABLE} or ${NAME_VARIABLE}, or name an experiment in tracking.experiment"


@dataclass(frozen=True)
class ServerAnswer:
    """What a server says.

    Attributes
    ----------
    verdict
        `ok`: it takes records; `away`: it does not say so now, and records are kept until it does; `refused`: it will
        take none until somebody changes what `fix` says.
    text: one line without credentials, with the server's own reason.
    fix: what to do about it; empty for `ok`.
    """

    verdict: Literal["ok", "away", "refused"]
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


def ask_server(config: TrackingConfig, run_dir: Path, *, limit_s: float = ANSWER_S) -> ServerAnswer:
    """Ask the server in force for `run_dir` whether this job may write to its experiment, which is made if need be.

    It waits at most `limit_s` for the server, and before that until `mlflow` is imported. A SQLite file is only looked
    at. With `tracking.register` it asks the registry in the same way about the registered model.

    Raises
    ------
    ConfigError
        `tracking.uri`, `tracking.experiment` or `tracking.register` is malformed.
    """
    check_model_name(config)
    uri, key = resolve_uri(config, run_dir), resolve_experiment(config)
    if not config.enabled:
        return ServerAnswer("ok", "nothing is sent to MLflow (tracking.enabled: false)")
    question = _Question(uri, f"permission EDIT on {key}, or name another experiment in tracking.experiment")
    database, name = database_file(uri), config.register
    answer = question.ask(partial(_ask_client, key=key), limit_s) if database is None else _look_at(database, key)
    registry = resolve_registry(uri)
    if answer.verdict == "ok" and name is not None and database_file(registry) is None:
        uri = registry
        question = _Question(uri, f"permission EDIT on registered model {name!r}, or name another in tracking.register")
        answer = question.ask(partial(_ask_registry, name=name), limit_s)
    return replace(answer, text=f"MLflow at {redact(uri)}: {one_line(answer.text)}")


@dataclass(frozen=True)
class _Question:
    """One question to one server.

    Attributes
    ----------
    permission: which one lacks if the server forbids it, and what to do without.
    """

    uri: str
    permission: str

    def ask(self, question: Callable[[Any], ServerAnswer], limit_s: float) -> ServerAnswer:
        """What the server says within `limit_s`."""
        import mlflow  # noqa: F401  # takes seconds, which are not the server's

        answers: list[ServerAnswer] = []
        over = threading.Event()

        def alive() -> None:
            if over.is_set():
                raise TimeoutError("asked too late")

        def work() -> None:
            try:
                with open_client(self.uri, alive) as client:
                    answers.append(question(client))
            except Exception as error:  # whatever the network, the server or its client raises
                answers.append(self.meaning(error))

        with mlflow_settings(self.uri, limit_s):
            thread = threading.Thread(target=work, name="tracking-check", daemon=True)
            thread.start()
            thread.join(limit_s)
            over.set()
        return answers[0] if answers else _away(f"no answer within {limit_s:g} s")

    def meaning(self, error: Exception) -> ServerAnswer:
        """What an error of MLflow's client means."""
        from requests.exceptions import SSLError

        code, text = getattr(error, "error_code", ""), str(error)
        reason = text.partition(BODY)[2].strip("'\" ") or text.rpartition(CAUSE)[2].removesuffix("))")
        reason = (reason or type(error).__name__).rstrip(".")
        if isinstance(error.__context__, SSLError):
            fix = "check http:// or https:// in its URI; MLFLOW_TRACKING_SERVER_CERT_PATH names its certificate"
        elif isinstance(error, NoExperimentError):
            fix = _OTHER_ID
        elif code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            reason, fix = f"401: {reason}", _log_in()
        elif INVALID_HOST in text:
            host = urlsplit(self.uri).netloc.rpartition("@")[2]
            reason = f"403: {reason}"
            fix = f"start the server with --allowed-hosts {host} among its hosts, the port included"
        elif code == "PERMISSION_DENIED":
            reason, fix = f"403: {reason}", f"ask for the {self.permission}"
        elif code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST") and not text.startswith(NOT_JSON):
            fix = "correct tracking.experiment or tracking.register"
        else:
            return _away(reason)
        return ServerAnswer("refused", reason, fix)


def _ask_client(client: Any, key: ExperimentKey) -> ServerAnswer:
    experiment = find_experiment(client, key)
    if experiment is None:
        assert key.name is not None
        experiment = make_experiment(client, key.name)
    if experiment.lifecycle_stage != "active":
        return _deleted(experiment.name, experiment.experiment_id)
    mark_experiment(client, experiment)
    return ServerAnswer("ok", f"takes records of experiment {experiment.name!r}")


def _ask_registry(client: Any, name: str) -> ServerAnswer:
    open_registered_model(client, name)
    return ServerAnswer("ok", f"takes records, and versions of registered model {name!r}")


def _look_at(database: Path, key: ExperimentKey) -> ServerAnswer:
    """What a SQLite file allows. MLflow would take seconds to open it, and makes it if it does not exist."""
    if not database.exists():
        return ServerAnswer("ok", "will be made")
    column, value = ("name", key.name) if key.name is not None else ("experiment_id", key.id)
    query = f"SELECT experiment_id, name, lifecycle_stage FROM experiments WHERE {column} = ?"
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=0.0)) as link:
            link.execute("BEGIN IMMEDIATE")
            made = link.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
            row = link.execute(query, (value,)).fetchone() if made else None
            link.rollback()
    except sqlite3.Error as error:
        if error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return _away(str(error))
        fix = f"make {database} a SQLite file that this user may write, or name another store in tracking.uri"
        return ServerAnswer("refused", str(error), fix)
    if row is None and key.name is None:
        return ServerAnswer("refused", f"no experiment has the id {key.id}", _OTHER_ID)
    if row is None:
        return ServerAnswer("ok", f"takes records of {key}")
    number, name, stage = row
    return ServerAnswer("ok", f"takes records of experiment {name!r}") if stage == "active" else _deleted(name, number)


def _log_in() -> str:
    given = [name for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN") if os.environ.get(name)]
    if given:
        return f"correct the user of ${given[0]}" if "USER" in given[0] else f"renew ${given[0]}"
    return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def _deleted(name: str, number: object) -> ServerAnswer:
    fix = f"mlflow experiments restore --experiment-id {number}, or name another experiment in tracking.experiment"
    return ServerAnswer("refused", f"experiment {name!r} is deleted", fix)


def _away(reason: str) -> ServerAnswer:
    return ServerAnswer("away", reason, f"check the server, the network, and tracking.uri or ${URI_VARIABLE}")
