"""MLflow's client as the sender uses it: short of patience, silent, and watched; nothing of it is global for long.

mlflow takes seconds to import and a SQLite store seconds to set up: both happen inside `open_sink`, in the thread
that sends.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from cluster.tracking.mlflow_sink import LogModel, MlflowSink

if TYPE_CHECKING:
    from mlflow import MlflowClient


class WatchedClient:
    """MLflow's client; tells of each call before it begins."""

    def __init__(self, client: MlflowClient, alive: Callable[[], None]) -> None:
        self._client, self._alive = client, alive

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._alive()
            return method(*arguments, **named)

        return call


@contextmanager
def open_sink(
    uri: str, run_dir: Path, log_model: LogModel | None, alive: Callable[[], None] = lambda: None
) -> Iterator[MlflowSink]:
    """A sink for one MLflow server. `alive` hears of each request; MLflow is silent in this thread."""
    from mlflow import MlflowClient

    with _silence("mlflow", "alembic"):
        client = WatchedClient(MlflowClient(uri, registry_uri=uri), alive)
        yield MlflowSink(cast("MlflowClient", client), run_dir, _artifact_root(uri), log_model)


@contextmanager
def mlflow_settings(uri: str, timeout_s: float) -> Iterator[None]:
    """While entered, MLflow is short of patience; it reads its limits from the environment only."""
    artifact_root = _artifact_root(uri)
    seconds = str(max(1, round(timeout_s)))
    settings = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": seconds,
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": seconds,  # of uploads to object stores, past the server
        # its parts are sent by a pool of threads that knows no limit and holds the process back at its end
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender retries, and keeps the order
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    if artifact_root is not None:
        # without it MLflow makes a folder `mlruns` wherever the job happens to run
        settings["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifact_root.as_uri()
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
    """Keep what these loggers say off the terminal, for this thread only: what goes wrong is raised as well."""
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


def _artifact_root(uri: str) -> Path | None:
    """Folder beside a SQLite store's file; servers and other databases know their own place."""
    if not uri.startswith("sqlite"):
        return None
    database = unquote(uri.partition("///")[2].partition("?")[0])
    return Path(database).absolute().parent / "mlartifacts"
