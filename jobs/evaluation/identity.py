"""What the results of a run directory depend on: kept beside them, and compared before others are added.

`config.yaml` of the directory holds the configuration, the first seed (it is measured more thoroughly, and settings are
chosen with it) and, for every row that was asked for so far, what the row is made of. Rows and seeds may be added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any

from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.rows import Row
from simmatch.config import ConfigError, Frozen, parse
from simmatch.documents import DocumentError, dump_yaml, load_yaml_file
from simmatch.files import write_whole

FREE = frozenset({"tracking", "quick", "seeds", "stacks", "rivals", "networks"})
"""Keys that results do not depend on, or not all of them; rows and the first seed are compared by themselves."""

FILE, SETTINGS = "config.yaml", "settings.json"

DATA = "data_digest"
"""Key of the digest of the data, compared by `same_data`."""


def identity(run_dir: Path, config: EvaluationConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """The directory's `config.yaml` with these rows, to be written by `keep`.

    Raises
    ------
    ConfigError
        The directory cannot be read, or holds results of another configuration; names what differs.
    """
    values = config.model_dump(mode="json", exclude=set(FREE)) | {"first_seed": config.seeds[0]}
    definitions: dict[str, Any] = {row.name: row.definition for row in rows}
    if not begun(run_dir):
        return values | {"rows": definitions}
    known = kept(run_dir)
    others = dict(known.pop("rows", None) or {})
    first = known.pop("first_seed", config.seeds[0])
    before = filled(config, FREE, known) | {"first_seed": first}
    changed = [f"rows.{name}" for name, value in definitions.items() if others.get(name, value) != value]
    same(run_dir, values, before, changed)
    return values | {"rows": others | definitions}


def begun(run_dir: Path) -> bool:
    """Whether the directory holds settings or results.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    try:
        return (run_dir / SETTINGS).exists() or any(run_dir.glob("results/*.json"))
    except OSError as error:
        raise unreadable(run_dir, error) from None


def kept(run_dir: Path) -> dict[str, Any]:
    """What `keep` wrote.

    Raises
    ------
    ConfigError
        It cannot be read, or holds something else.
    """
    try:
        known = load_yaml_file(run_dir / FILE)
    except (OSError, DocumentError) as error:
        raise unreadable(run_dir, error) from None
    if not isinstance(known, dict):
        raise ConfigError(f"--run-dir: expected a mapping in {run_dir / FILE}, got {type(known).__name__}")
    return known


def filled(config: Frozen, free: Collection[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version has kept, with the keys of `config` that it did not know at their defaults."""
    fields = {key: value for key, value in known.items() if key in type(config).model_fields}
    known = {key: value for key, value in known.items() if key != DATA}
    try:
        whole = parse(type(config), config.model_dump(mode="json", include=set(free)) | fields)
    except ConfigError:
        return dict(known)
    return dict(known) | whole.model_dump(mode="json", exclude=set(free))


def same(run_dir: Path, values: Mapping[str, Any], before: Mapping[str, Any], changed: Sequence[str] = ()) -> None:
    """Refuse a directory that holds results of something else.

    Raises
    ------
    ConfigError
        Names the keys in which `values` differs from what was kept `before`, and those of `changed`.
    """
    differing = {key for key, value in values.items() if before.get(key) != value} | set(changed)
    if differing or before.keys() != values.keys():
        raise ConfigError(
            f"--run-dir: expected a new folder or results of this configuration, got {run_dir}, which differs in "
            f"{', '.join(sorted(differing)) or 'keys of its own'}"
        )


def same_data(run_dir: Path, digest: str) -> None:
    """Refuse a directory that holds results of other data: files may have changed, or be those of another machine.

    Raises
    ------
    ConfigError
        Names both digests, and this machine.
    """
    before = kept(run_dir).get(DATA) if begun(run_dir) else None
    if before not in (None, digest):
        where = f"{run_dir}, whose results are of {before}"
        raise ConfigError(f"--run-dir: expected results of the data on {gethostname()}, {digest}, got {where}")


def keep(run_dir: Path, values: Mapping[str, Any]) -> Path:
    """Write `config.yaml`.

    Raises
    ------
    ConfigError
        The directory cannot be written to.
    """
    path = run_dir / FILE
    try:
        write_whole(path, dump_yaml(dict(values)))
    except OSError as error:
        raise unwritable(run_dir, error) from None
    return path


def unreadable(run_dir: Path, error: Exception) -> ConfigError:
    return ConfigError(f"--run-dir: expected a folder that can be read, got {run_dir}: {error}")


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--run-dir: expected a folder that can be written to, got {run_dir}: {error}")
