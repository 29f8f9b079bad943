"""Which tracking URIs MLflow can reach, checked before anything starts."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from cluster.redaction import redact
from simmatch.config import ConfigError

URI_VARIABLE = "MLFLOW_TRACKING_URI"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


def check_uri(uri: str) -> str:
    """Refuse what MLflow could never reach; a SQLite path comes back absolute.

    Raises
    ------
    ConfigError
        Names `tracking.uri`, what was expected and what was given.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if scheme not in {*SCHEMES, *plugins} - {"file"}:
        raise _uri_error(f"a URI of scheme {', '.join(SCHEMES)}", uri)
    if scheme in ("http", "https") and not _has_host(uri):
        raise _uri_error(f"{scheme}://HOST[:PORT]", uri)
    if scheme == "sqlite":
        head, slashes, path = uri.partition(":///")
        if not slashes or not path:
            raise _uri_error("sqlite:///PATH", uri)
        return f"{head}:///{Path(path).absolute()}"
    return uri


def _uri_error(expected: str, uri: str) -> ConfigError:
    return ConfigError(f"tracking.uri: expected {expected}, got {redact(uri)!r}")


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
