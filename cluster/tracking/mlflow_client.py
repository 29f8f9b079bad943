"""MLflow's client as the sender uses it: short time-outs, no output, and errors told apart by what can be done.

mlflow takes seconds to import and a SQLite store seconds to set up: both happen inside `open_client`, in the thread
that sends.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from cluster.tracking.config import sqlite_uri
from cluster.tracking.delivery import RejectedError, RunsLostError
from simmatch.files import create_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient


# error codes of requests that can never succeed; any other error may pass
FINAL_ERROR_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"}
)
# HTTP status of uploads that can never succeed: no such place, or too large a file
FINAL_STATUS = frozenset({400, 404, 405, 411, 413, 414, 415, 501})
# begins the message of MLflow's client if the refusal was not JSON
NOT_JSON = "API request to endpoint"
# raised for an unsound event, or for an answer that is not MLflow's
DOUBTFUL_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


class WatchedClient:
    """MLflow's client; calls `alive` before each request."""

    def __init__(self, client: MlflowClient, alive: Callable[[], None]) -> None:
        self._client, self._alive = client, alive

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._alive()
            return method(*arguments, **named)

        return call


@contextmanager
def open_client(uri: str, alive: Callable[[], None], registry: str | None = None) -> Iterator[MlflowClient]:
    """A client of one MLflow server; `alive` is called before each request. MLflow is silent in this thread.

    registry: URI of the model registry; None: the server itself.
    """
    from mlflow import MlflowClient

    with _silence("mlflow", "alembic"):
        for place in dict.fromkeys((uri, registry or uri)):
            if (database := database_file(place)) is not None:
                _make_database(database)
        yield cast("MlflowClient", WatchedClient(MlflowClient(uri, registry_uri=registry or uri), alive))


def _make_database(file: Path) -> None:
    """Make a SQLite store that does not exist, in one step: of several jobs that begin at once, one makes it.

    MLflow fills a new file table by table and locks nothing: two at the same moment, or a process that ends meanwhile,
    leave a file that no later job can open.
    """
    from mlflow import MlflowClient

    if file.exists():
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder) / file.name
        MlflowClient(sqlite_uri(made))
        with suppress(FileExistsError):
            create_whole(file, made.read_bytes())


@contextmanager
def mlflow_settings(uri: str, timeout_s: float) -> Iterator[None]:
    """While entered, MLflow has short time-outs; it reads them from the environment only."""
    root = artifact_root(uri)
    seconds = str(max(1, round(timeout_s)))
    settings = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": seconds,
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": seconds,  # of uploads to object stores, past the server
        # its parts are sent by a pool of threads that has no time-out and holds up the end of the process
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender retries, and keeps the order
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    if root is not None:
        # without it MLflow makes a folder `mlruns` wherever the job happens to run
        settings["_MLFLOW_SERVER_ARTIFACT_ROOT"] = root.as_uri()
    with _environment(settings):
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, the only place MLflow reads its limits from, and put them back."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _silence(*loggers: str) -> Iterator[None]:
    """Keep the messages of these loggers off the terminal, for this thread only: errors are raised as well."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread

    handlers = {handler for name in loggers for handler in logging.getLogger(name).handlers}
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def artifact_root(uri: str) -> Path | None:
    """Folder for artifacts beside a SQLite store's file; servers and other data bases have their own."""
    database = database_file(uri)
    return None if database is None else database.parent / "mlartifacts"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other."""
    if not uri.startswith("sqlite"):
        return None
    return Path(unquote(uri.partition("///")[2].partition("?")[0])).absolute()


@contextmanager
def translate_errors(answers: Callable[[], bool]) -> Iterator[None]:
    """Raise RejectedError for what can never work, RunsLostError for what needs a fresh start, and the rest as it is.

    A gateway whose server is away may answer 400 or 404 as well: a refusal counts if MLflow `answers`, and stays
    doubtful if it came as a page of text, as MLflow's own refusals do not.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException

    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RejectedError(f"{type(error).__name__}: {error}") from error
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RunsLostError(str(error)) from error
        if error.error_code in FINAL_ERROR_CODES and answers():
            raise RejectedError(str(error), certain=not str(error).startswith(NOT_JSON)) from error
        raise
    except RequestException as error:
        status = error.response.status_code if isinstance(error, HTTPError) and error.response is not None else None
        if status in FINAL_STATUS and answers():
            raise RejectedError(str(error), certain=False) from error
        raise
    except DOUBTFUL_ERRORS as error:
        if answers():
            raise RejectedError(f"{type(error).__name__}: {error}") from error
        raise
