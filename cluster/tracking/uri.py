"""Which tracking URIs MLflow can reach, checked before anything starts, and how a file is named in one."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote, urlsplit

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
        return f"{head}:///{_in_uri(Path.cwd()) / path}"
    return uri


def sqlite_uri(path: Path) -> str:
    """URI of a SQLite database in this file.

    >>> sqlite_uri(Path("/runs/50%?/mlflow.db"))
    'sqlite:////runs/50%25%3F/mlflow.db'
    """
    return f"sqlite:///{_in_uri(path.absolute())}"


def _in_uri(path: Path) -> Path:
    """Quoted where a character means something in a URI; SQLAlchemy takes the quotes away again."""
    return Path(re.sub("[%?#]", lambda found: quote(found[0]), str(path)))


def _uri_error(expected: str, uri: str) -> ConfigError:
    return ConfigError(f"tracking.uri: expected {expected}, got {redact(uri)!r}")


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
