"""What a comparison needs to continue: results and chosen settings so far, and the identity that they belong to.

Each result is a file, written as soon as it is known. The identity is checked before results are added.
`config.yaml` of the directory holds the configuration, the first seed (it is measured more thoroughly, and settings are
chosen with it) and, for every row that was asked for so far, its definition. Rows and seeds may be added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.tracking.spool import SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.material import Material, digest_of
from jobs.evaluation.results import RowResult
from jobs.evaluation.rows import Row
from jobs.origin import program_commit, source_tags
from jobs.reporting import hardware
from simmatch.config import ConfigError, Frozen, parse
from simmatch.documents import DocumentError, dump_json, dump_yaml, load_json, load_yaml_file
from simmatch.files import write_whole

FREE = frozenset({"tracking", "quick", "seeds", "stacks", "rivals", "networks"})
"""Keys that results do not depend on, or not all of them; rows and the first seed are compared by themselves."""

FILE, SETTINGS, RESULTS = "config.yaml", "settings.json", "results"

DATA = "data_digest"
"""Key of the digest of the data, compared by `check_same_data`."""


ResultT = TypeVar("ResultT", bound=BaseModel)


class ResultStore(Generic[ResultT]):
    """The results of a run directory, a file for each.

    Parameters
    ----------
    model: class of the results.
    key: fields that tell one result from the others.
    name: values of these fields → name of the file, without its suffix.
    """

    def __init__(self, folder: Path, model: type[ResultT], key: Sequence[str], name: Callable[..., str]) -> None:
        self.folder, self.model, self.key, self.name = folder, model, key, name

    def load(self, *values: object) -> ResultT | None:
        """The result with these values of its key; None if there is no file, or it holds something else."""
        try:
            result = self.model.model_validate_json(self._path(*values).read_text())
        except (FileNotFoundError, ValidationError):
            return None
        return result if self._values(result) == values else None

    def save(self, result: ResultT) -> None:
        """Write the file, whole or not at all."""
        write_whole(self._path(*self._values(result)), dump_json(result.model_dump()))

    def _values(self, result: ResultT) -> tuple[object, ...]:
        return tuple(getattr(result, field) for field in self.key)

    def _path(self, *values: object) -> Path:
        return self.folder / f"{self.name(*values)}.json"


def row_results(run_dir: Path) -> ResultStore[RowResult]:
    """The results of `jobs.evaluate`, a file for each row and seed."""
    return ResultStore(
        run_dir / RESULTS, RowResult, ("row", "seed"), lambda row, seed: f"{re.sub('[^A-Za-z0-9_-]', '_', row)}-{seed}"
    )


class ChosenSettings:
    """The settings chosen so far, by key, in a file of the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / SETTINGS

    def known(self, key: str) -> Any:
        """What was chosen for a key; None if nothing was yet."""
        return self._read().get(key)

    def keep(self, key: str, chosen: object) -> None:
        """Write the file, whole or not at all."""
        write_whole(self.path, dump_json(self._read() | {key: chosen}))

    def _read(self) -> dict[str, object]:
        try:
            values = load_json(self.path.read_bytes())
        except (FileNotFoundError, DocumentError):
            return {}
        return values if isinstance(values, dict) else {}


def begin(
    tracker: Tracker,
    identity: Mapping[str, Any],
    params: Mapping[str, Any],
    data: str,
    material: Material,
    other: Material | None = None,
) -> None:
    """Start the record of `jobs.evaluate` or `jobs.finetune`, and write the identity of the comparison.

    Parameters
    ----------
    identity: what the results of the run directory depend on.
    params: of the run.
    data: name of the data set; material: its images; other: those of a second data set that results depend on.

    Raises
    ------
    ConfigError
        Another process works in the run directory; it cannot be written to; it holds results of other data.
    """
    digest = digest_of(material, other)
    check_same_data(tracker.run_dir, digest)
    facts = hardware()
    tags = {f"simmatch.{key}": str(facts[key]) for key in ("cpu", "cores_available", "commit", "torch")}
    tags |= source_tags(program_commit())
    try:
        tracker.start(tracker.run_dir.name, layers=0, tags=tags)
    except SpoolBusyError as error:
        raise ConfigError(f"--run-dir: another process works in {tracker.run_dir}: {error}") from None
    except OSError as error:
        raise _unwritable(tracker.run_dir, error) from None
    definition = write_identity(tracker.run_dir, {**identity, DATA: digest})
    tracker.params(params)
    images = len(material.train) + len(material.held_out)
    tracker.dataset(data, source=data, digest=material.digest, num_images=images)
    tracker.artifact(definition)


def identity(run_dir: Path, config: EvaluationConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """The directory's `config.yaml` with these rows added, for `write_identity`.

    Raises
    ------
    ConfigError
        The directory cannot be read, or holds results of another configuration; names the keys that differ.
    """
    values = config.model_dump(mode="json", exclude=set(FREE)) | {"first_seed": config.seeds[0]}
    definitions: dict[str, Any] = {row.name: row.definition for row in rows}
    if not has_results(run_dir):
        return values | {"rows": definitions}
    before = read_identity(run_dir)
    others = dict(before.pop("rows", None) or {})
    first = before.pop("first_seed", config.seeds[0])
    before = with_defaults(config, FREE, before) | {"first_seed": first}
    changed = [f"rows.{name}" for name, value in definitions.items() if others.get(name, value) != value]
    check_same(run_dir, values, before, changed)
    return values | {"rows": others | definitions}


def has_results(run_dir: Path) -> bool:
    """Whether the directory holds chosen settings or results.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    try:
        return (run_dir / SETTINGS).exists() or any((run_dir / RESULTS).glob("*.json"))
    except OSError as error:
        raise _unreadable(run_dir, error) from None


def read_identity(run_dir: Path) -> dict[str, Any]:
    """What `write_identity` wrote.

    Raises
    ------
    ConfigError
        It cannot be read, or holds something else.
    """
    try:
        values = load_yaml_file(run_dir / FILE)
    except (OSError, DocumentError) as error:
        raise _unreadable(run_dir, error) from None
    if not isinstance(values, dict):
        raise ConfigError(f"--run-dir: expected a mapping in {run_dir / FILE}, got {type(values).__name__}")
    return values


def with_defaults(config: Frozen, free: Collection[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that an earlier version wrote; keys of `config` that it did not know get their defaults."""
    fields = {key: value for key, value in before.items() if key in type(config).model_fields}
    before = {key: value for key, value in before.items() if key != DATA}
    try:
        whole = parse(type(config), config.model_dump(mode="json", include=set(free)) | fields)
    except ConfigError:
        return dict(before)
    return dict(before) | whole.model_dump(mode="json", exclude=set(free))


def check_same(
    run_dir: Path, values: Mapping[str, Any], before: Mapping[str, Any], changed: Sequence[str] = ()
) -> None:
    """Refuse a directory that holds results of another configuration.

    Raises
    ------
    ConfigError
        Names the keys in which `values` differs from the identity `before`, and those of `changed`.
    """
    differing = {key for key, value in values.items() if before.get(key) != value} | set(changed)
    if differing or before.keys() != values.keys():
        raise ConfigError(
            f"--run-dir: expected a new folder or results of this configuration, got {run_dir}, which differs in "
            f"{', '.join(sorted(differing)) or 'keys of its own'}"
        )


def check_same_data(run_dir: Path, digest: str) -> None:
    """Refuse a directory that holds results of other data: files have changed, or belong to another machine.

    Raises
    ------
    ConfigError
        Names both digests, and this machine.
    """
    before = read_identity(run_dir).get(DATA) if has_results(run_dir) else None
    if before not in (None, digest):
        where = f"{run_dir}, whose results are of {before}"
        raise ConfigError(f"--run-dir: expected results of the data on {gethostname()}, {digest}, got {where}")


def write_identity(run_dir: Path, values: Mapping[str, Any]) -> Path:
    """Write `config.yaml`; returns its path.

    Raises
    ------
    ConfigError
        The directory cannot be written to.
    """
    path = run_dir / FILE
    try:
        write_whole(path, dump_yaml(dict(values)))
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return path


def _unreadable(run_dir: Path, error: Exception) -> ConfigError:
    return ConfigError(f"--run-dir: expected a folder that can be read, got {run_dir}: {error}")


def _unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--run-dir: expected a folder that can be written to, got {run_dir}: {error.strerror or error}")
