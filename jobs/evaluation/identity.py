"""What the results of a run directory depend on: kept beside them, and compared before others are added.

`config.yaml` of the directory holds the configuration, the first seed (it is measured more thoroughly, and settings are
chosen with it) and, for every row that was asked for so far, what the row is made of. Rows and seeds may be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.rows import Row
from simmatch.config import ConfigError, parse

FREE = {"tracking", "quick", "seeds", "stacks", "rivals", "networks"}
"""Keys that results do not depend on, or not all of them; rows and the first seed are compared by themselves."""

FILE = "config.yaml"


def identity(run_dir: Path, config: EvaluationConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """The directory's `config.yaml` with these rows, to be written by `keep`.

    Raises
    ------
    ConfigError
        The directory cannot be read, or holds results of another configuration; names what differs.
    """
    values = _plain(config) | {"first_seed": config.seeds[0]}
    definitions: dict[str, Any] = {row.name: row.definition for row in rows}
    try:
        begun = (run_dir / "settings.json").exists() or any(run_dir.glob("results/*.json"))
        known = yaml.safe_load((run_dir / FILE).read_text()) if begun else None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--run-dir: expected a folder that can be read, got {run_dir}: {error}") from None
    if not isinstance(known, Mapping):
        return values | {"rows": definitions}
    others = dict(known.get("rows") or {})
    before = _filled(known, config) | {"first_seed": known.get("first_seed", config.seeds[0])}
    differing = [key for key, value in values.items() if before.get(key) != value]
    differing += [f"rows.{name}" for name, value in definitions.items() if others.get(name, value) != value]
    if differing or before.keys() != values.keys():
        raise ConfigError(
            f"--run-dir: expected a new folder or results of this configuration, got {run_dir}, which differs in "
            f"{', '.join(sorted(differing)) or 'keys of its own'}"
        )
    return values | {"rows": others | definitions}


def keep(run_dir: Path, values: Mapping[str, Any]) -> Path:
    """Write `config.yaml`; whole or not at all.

    Raises
    ------
    ConfigError
        The directory cannot be written to.
    """
    path = run_dir / FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(yaml.safe_dump(dict(values), sort_keys=False))
        draft.replace(path)
    except OSError as error:
        raise unwritable(run_dir, error) from None
    return path


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--run-dir: expected a folder that can be written to, got {run_dir}: {error}")


def _plain(config: EvaluationConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=FREE)


def _filled(known: Mapping[str, Any], config: EvaluationConfig) -> dict[str, Any]:
    """What an earlier version has kept, with the keys that it did not know at their defaults."""
    own = {key: value for key, value in known.items() if key not in {"rows", "first_seed"}}
    try:
        return _plain(parse(EvaluationConfig, config.model_dump(mode="json", include=FREE) | own))
    except ConfigError:
        return own
