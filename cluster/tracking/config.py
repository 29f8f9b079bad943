"""The configuration of tracking, and which MLflow tracking URI is in force; checked before anything starts."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote, urlsplit

from cluster.redaction import HIDDEN, Redactor, redact
from simmatch.config import ConfigError, Frozen, NonNegativeFloat, PositiveFloat

URI_VARIABLE = "MLFLOW_TRACKING_URI"
NAME_VARIABLE, ID_VARIABLE = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"
DEFAULT_EXPERIMENT = "simmatch"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


with warnings.catch_warnings():
    # every abstract class has a method `register`, which nothing calls here
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class TrackingConfig(Frozen):
        """Where a run's parameters, metrics, figures and model are recorded."""

        enabled: bool = True
        """Send to MLflow. The spool is written either way."""

        uri: str | None = None
        """MLflow's tracking URI. None: `$MLFLOW_TRACKING_URI`, then `mlflow.db` (SQLite) beside the run directory."""

        experiment: str | None = None
        """Name of the MLflow experiment, made if it does not exist. None: `$MLFLOW_EXPERIMENT_NAME`, then
        `$MLFLOW_EXPERIMENT_ID`, then `simmatch`. Where both variables are set, they have to name the same
        experiment."""

        register: str | None = None
        """Registered model that a finished run becomes a new version of, in the registry of `$MLFLOW_REGISTRY_URI`,
        then of the tracking server. None: none."""

        system_metrics_s: NonNegativeFloat = 10.0
        """Seconds between two samples of each node's CPU, memory, disk, network and GPUs. 0: none."""

        timeout_s: PositiveFloat = 10.0
        """Longest wait for one answer of the server."""

        flush_s: NonNegativeFloat = 60.0
        """Longest wait, at the end of the job, for what is not sent yet."""


@dataclass(frozen=True)
class ExperimentKey:
    """Which experiment a run belongs to: by name, by id, or by both, which then have to agree."""

    name: str | None
    id: str | None = None

    def __str__(self) -> str:
        return f"experiment {self.name!r}" if self.name is not None else f"the experiment of id {self.id}"


def resolve_experiment(config: TrackingConfig) -> ExperimentKey:
    """The experiment in force: the configured one, or the environment's, as MLflow's own client reads it.

    Raises
    ------
    ConfigError
        `tracking.experiment` is empty.
    """
    if config.experiment is not None:
        if not config.experiment.strip():
            raise ConfigError(f"tracking.experiment: expected a name, got {config.experiment!r}")
        return ExperimentKey(config.experiment)
    name, number = os.environ.get(NAME_VARIABLE) or None, os.environ.get(ID_VARIABLE) or None
    return ExperimentKey(DEFAULT_EXPERIMENT if name is None and number is None else name, number)


def resolve_uri(config: TrackingConfig, run_dir: Path) -> str:
    """The tracking URI in force: the configured one, the environment's, or a SQLite file beside `run_dir`."""
    return check_uri(config.uri or os.environ.get(URI_VARIABLE) or default_uri(run_dir))


def resolve_registry(tracking_uri: str) -> str:
    """The URI of the model registry in force: the environment's, or that of tracking."""
    return check_uri(os.environ.get(REGISTRY_VARIABLE) or tracking_uri, REGISTRY_VARIABLE)


def check_model_name(config: TrackingConfig) -> None:
    """Refuse a name that a registry refuses, or that its filters could not hold.

    Raises
    ------
    ConfigError
        Names `tracking.register`.
    """
    name = config.register
    if name is not None and not re.fullmatch(r"\w[\w .-]{0,199}", name):
        raise ConfigError(f"tracking.register: expected letters, digits, spaces, '_', '.' and '-', got {name[:200]!r}")


def default_uri(run_dir: Path) -> str:
    """The URI of a SQLite file beside the run directory."""
    return sqlite_uri(run_dir.absolute().parent / "mlflow.db")


def recorded_uri(recorded: str, run_dir: Path) -> str:
    """The tracking URI `recorded` in a spool's first event, with its password, if this environment names it as well.

    Whoever can write to a run directory could otherwise have the environment's credentials sent to his own server, and
    that server, or a data base of his, could name the folder of this machine that artifacts are written to.

    Raises
    ------
    ConfigError
        It is neither the environment's nor the data base beside the run directory.
    """
    hide = Redactor(os.environ)
    for uri in (os.environ.get(URI_VARIABLE), default_uri(run_dir)):
        if uri and hide(check_uri(uri)) == recorded:
            return uri
    password = " with its password" if HIDDEN in recorded else ""
    raise ConfigError(f"--uri: expected {recorded}{password} here or in ${URI_VARIABLE}: a record alone is not trusted")


def sync_command(run_dir: Path, uri: str) -> str:
    """The command that sends the events that a run has not sent yet to a server."""
    known = (os.environ.get(URI_VARIABLE), default_uri(run_dir))
    options = [] if uri in known else ["--uri", redact(uri)]
    return shlex.join(["python", "-m", "jobs.sync", str(run_dir), *options])


def check_uri(uri: str, key: str = "tracking.uri") -> str:
    """Refuse a URI that MLflow could never reach; a SQLite path becomes absolute.

    key: where it was given.

    Raises
    ------
    ConfigError
        Names the key, what was expected and what was given.
    """
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if scheme not in {*SCHEMES, *plugins} - {"file"}:
        raise _uri_error(key, f"a URI of scheme {', '.join(SCHEMES)}", uri)
    if scheme in ("http", "https") and not _has_host(uri):
        raise _uri_error(key, f"{scheme}://HOST[:PORT]", uri)
    if scheme == "sqlite":
        head, slashes, path = uri.partition(":///")
        if not slashes or not path:
            raise _uri_error(key, "sqlite:///PATH", uri)
        return f"{head}:///{_in_uri(Path.cwd()) / path}"
    return uri


def sqlite_uri(path: Path) -> str:
    """URI of a SQLite database in this file.

    >>> sqlite_uri(Path("/runs/50%?/mlflow.db"))
    'sqlite:////runs/50%25%3F/mlflow.db'
    """
    return f"sqlite:///{_in_uri(path.absolute())}"


def _in_uri(path: Path) -> Path:
    """Quote the characters that mean something in a URI; SQLAlchemy unquotes them."""
    return Path(re.sub("[%?#]", lambda match: quote(match[0]), str(path)))


def _uri_error(key: str, expected: str, uri: str) -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, got {redact(uri)!r}")


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
