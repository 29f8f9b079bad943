"""Where a run's files go, and whether it begins or continues.

A run directory is a folder or a URI such as s3://bucket/runs/digits. A URI has a working folder on this machine, below
`runs/remote`, for files that grow (`jobs.mirror`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.checkpoints.manifest import MANIFEST, CheckpointError, read_manifest
from cluster.checkpoints.reader import Reader, newest_good
from cluster.config import RunConfig
from cluster.storage import AnyPath, exists, find, locate, read
from jobs.ray_job import in_throw_away_copy
from simmatch.config import ConfigError, parse
from simmatch.documents import DocumentError, load_json, load_yaml, quoted

FREE = (
    "cluster",
    "tracking",
    "checkpoint",
    "probe",
    "mesh",
    "device",
    "divergence",
    "log_every",
    "encode_batch",
    "cache_features",
)
"""Keys that may differ between a run and its continuation: they change where and how it learns, not what."""


@dataclass(frozen=True)
class RunStart:
    """A run directory, and the checkpoint to continue from if there is one.

    Attributes
    ----------
    destination: the run directory, a folder or a URI.
    config: as given; keys that it leaves out and whose default has changed since are those of the run it continues.
    run_dir: the folder of this machine: the run directory itself, or the working folder of a URI.
    """

    destination: AnyPath
    resume: AnyPath | None
    note: str
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        if isinstance(self.destination, Path):
            return self.destination
        name = re.sub(r"[^\w.-]+", "-", str(self.destination).partition("://")[2]).strip("-")
        return default_root().absolute() / "remote" / name


def local_folder(option: str, given: str | None, default: Path) -> Path:
    """A folder of this machine, for jobs that write to no other place.

    Raises
    ------
    ConfigError
        Nothing, or a URI, was given.
    """
    if given is None:
        return default
    if not given or "://" in given:
        raise ConfigError(f"{option}: expected a folder of this machine, got {given or 'nothing'}")
    return Path(given)


def default_root() -> Path:
    """`runs` in the working directory; in a Ray job, whose working directory is a throw-away copy, in the home."""
    return Path.home() / "simmatch" / "runs" if in_throw_away_copy() else Path("runs")


def choose(config: RunConfig, run_dir: str | None, resume: str) -> RunStart:
    """Decide where to run.

    Parameters
    ----------
    run_dir: the user's folder or URI, or None for `runs/<name>`.
    resume: `auto` continues an unfinished run of this configuration and starts a numbered new one beside a finished
        one; `never` starts a new run; anything else is a run or a checkpoint to begin with. An unfinished run is
        continued itself if no other `run_dir` is given; otherwise a new run begins from its newest checkpoint.

    Raises
    ------
    ConfigError
        A relative folder inside a Ray job's copy, a store that does not answer, an unfinished run of another
        configuration, or a checkpoint that does not fit.
    """
    try:
        return _choose(config, run_dir, resume)
    except OSError as error:
        options = "--run-dir" if resume in ("auto", "never") else "--run-dir, --resume"
        raise ConfigError(f"{options}: expected a store that answers, got {error}") from None


def place_of(name: str, run_dir: str | None) -> AnyPath:
    """The run directory that is meant.

    Parameters
    ----------
    name: of the run.
    run_dir: the user's folder or URI, or None for `runs/<name>`.

    Raises
    ------
    ConfigError
        A relative folder inside a Ray job's copy, a folder that could not be made, or an unknown protocol.
    OSError
        A store that does not answer.
    """
    if run_dir is not None and in_throw_away_copy() and "://" not in run_dir and not Path(run_dir).is_absolute():
        raise ConfigError(
            f"--run-dir: expected an absolute path inside a Ray job, whose working directory is a copy that is "
            f"deleted, got {run_dir!r}"
        )
    if run_dir == "":
        raise ConfigError("--run-dir: expected a folder, got nothing")
    base = _located("--run-dir", run_dir if run_dir is not None else str(default_root() / name))
    _check_place(base)
    return base


def _choose(config: RunConfig, run_dir: str | None, resume: str) -> RunStart:
    base = place_of(config.name, run_dir)
    if resume not in ("auto", "never"):
        source = _located("--resume", resume)
        if exists(source / "config.yaml"):
            same, notes = _check_same(config, source)
            if _status(source) != "FINISHED" and (run_dir is None or _same_place(base, source)):
                return _continued(same, source, "continuing the run in", notes)
        return _from(config, base, source)
    for candidate in _numbered(base):
        if not exists(candidate / "config.yaml"):
            if isinstance(candidate, Path) and candidate.exists() and not candidate.is_dir():
                raise ConfigError(f"--run-dir: expected a folder, got the file {candidate}")
            return RunStart(candidate, None, f"a new run in {candidate}", config)
        if resume == "never" or _status(candidate) == "FINISHED":
            continue
        same, notes = _check_same(config, candidate)
        return _continued(same, candidate, "continuing the unfinished run in", notes)
    raise AssertionError("unreachable: the numbers do not end")


def as_begun(start: RunStart) -> RunStart:
    """The same with the threads per rank of the run that it continues, if the configuration leaves them open.

    They come from the checkpoint, or from the run's `config.yaml`. Another number changes the last bits of the result,
    which the note then says.
    """
    given, threads = start.config.cluster.threads_per_rank, None
    try:
        with suppress(ConfigError, DocumentError, FileNotFoundError):  # a new run has none yet
            begun = None if start.resume is None else read_manifest(start.resume).config
            threads = parse(
                RunConfig, begun or load_yaml(read(start.destination / "config.yaml"))
            ).cluster.threads_per_rank
    except OSError as error:
        raise ConfigError(f"--run-dir: expected a store that answers, got {error}") from None
    if threads is None or given == threads:
        return start
    if given is not None:
        change = f"cluster.threads_per_rank is {given}, it was {threads}: the last bits will differ"
        return replace(start, note=f"{start.note}\n{change}")
    cluster = start.config.cluster.model_copy(update={"threads_per_rank": threads})
    return replace(start, config=start.config.model_copy(update={"cluster": cluster}))


def _located(option: str, place: str) -> AnyPath:
    try:
        return locate(place)
    except ValueError as error:
        raise ConfigError(f"{option}: expected {error}") from None


def _check_place(base: AnyPath) -> None:
    """Refuse a folder that could not be created, before anything is."""
    if not isinstance(base, Path):
        exists(base)  # an answer is enough: whether it can be written to shows with the first file
        return
    try:
        existing = next(path for path in (base, *base.parents) if path.exists())
    except OSError as error:  # such as a name too long
        raise ConfigError(f"--run-dir: expected a folder that can be made, got {base}: {error.strerror}") from None
    if not existing.is_dir():
        raise ConfigError(f"--run-dir: expected a folder, got the file {existing}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--run-dir: expected a folder that can be written to, got {existing}")


def _numbered(base: AnyPath) -> Iterator[AnyPath]:
    yield base
    number = 2
    while True:
        yield base.with_name(f"{base.name}-{number}")
        number += 1


def _from(config: RunConfig, base: AnyPath, source: AnyPath) -> RunStart:
    """A new run at `base` from the checkpoint `source`, or from the newest sound one of the run `source`."""
    notes: list[str] = []
    checkpoint = source
    if exists(source / "config.yaml"):
        newest = newest_good(source, notes.append)
        if newest is None:
            why = "; ".join(notes) or "it has none"
            raise ConfigError(f"--resume: expected a run with a checkpoint to begin with, got {source}: {why}")
        checkpoint = newest
    elif not exists(source / MANIFEST):
        raise ConfigError(f"--resume: expected auto, never, a run directory or a checkpoint, got {source}")
    manifest = read_manifest(checkpoint)
    config = _check_differences(config, manifest.config, checkpoint)
    if checkpoint is source:
        Reader(source, manifest).verify()
    fresh = next(path for path in _numbered(base) if not exists(path / "config.yaml"))
    return RunStart(fresh, checkpoint, "\n".join([*notes, f"a new run in {fresh} from {checkpoint}"]), config)


def _same_place(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one).rstrip("/") == str(other).rstrip("/")


def _continued(config: RunConfig, run_dir: AnyPath, words: str, notes: list[str]) -> RunStart:
    """From the newest sound checkpoint; the note also names damaged ones."""
    checkpoint = newest_good(run_dir, notes.append)
    origin = "no checkpoint: from the beginning" if checkpoint is None else f"from {checkpoint.name}"
    return RunStart(run_dir, checkpoint, "\n".join([*notes, f"{words} {run_dir}, {origin}"]), config)


def _status(run_dir: AnyPath) -> str | None:
    try:
        status = load_json(read(run_dir / "summary.json")).get("status")
    except (FileNotFoundError, DocumentError, AttributeError):
        return None
    return status if isinstance(status, str) else None


def _check_same(config: RunConfig, run_dir: AnyPath) -> tuple[RunConfig, list[str]]:
    """Refuse to continue a run of another configuration; returns the configuration to continue with, and notes.

    If `config.yaml` is damaged, the configuration of the newest checkpoint takes its place.
    """
    path = run_dir / "config.yaml"
    try:
        other = load_yaml(read(path))
        content = type(other).__name__
    except DocumentError as error:
        other, content = None, str(error)
    if not isinstance(other, dict):
        for manifest in reversed(find(run_dir / "checkpoints", f"step-*/{MANIFEST}")):
            with suppress(CheckpointError):
                same = _check_differences(config, read_manifest(manifest.parent).config, manifest.parent)
                return same, [f"{path} is damaged ({content}): the configuration is that of {manifest.parent.name}"]
        raise ConfigError(f"--resume: expected the configuration of a run in {path} or in a checkpoint, got {content}")
    return _check_differences(config, other, run_dir), []


def _check_differences(config: RunConfig, other: Any, where: AnyPath) -> RunConfig:
    """Refuse to continue a run that learns something else; returns the configuration to continue with."""
    if not isinstance(other, dict):
        raise ConfigError(f"--resume: expected the configuration of a run in {where}, got {type(other).__name__}")
    theirs = dict(_flat(_with_defaults(other)))
    config = _with_recorded_tau(config, theirs)
    ours = dict(_flat(config.model_dump(mode="json")))
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    differing = [key for key in differing if key.split(".")[0] not in FREE and key != "name"]
    if differing:
        pairs = [(key, quoted(theirs.get(key)), quoted(ours.get(key))) for key in differing[:5]]
        parts = "; ".join(f"{key}: expected {expected}, got {given}" for key, expected, given in pairs)
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"--resume: {where} belongs to another configuration: {parts}{more}; use --resume never or --run-dir"
        )
    return config


def _with_recorded_tau(config: RunConfig, recorded: dict[str, Any]) -> RunConfig:
    """Take τ from the recorded run where a layer leaves it to the default, which was 0.5 in earlier versions."""
    layers = list(config.model.layers)
    for index, layer in enumerate(layers):
        tau = recorded.get(f"model.layers.{index}.plasticity.tau")
        if "tau" not in layer.plasticity.model_fields_set and isinstance(tau, float):
            plasticity = layer.plasticity.model_copy(update={"tau": tau})
            layers[index] = layer.model_copy(update={"plasticity": plasticity})
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": tuple(layers)})})


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an earlier version with its missing keys filled in; unchanged if it is invalid."""
    try:
        filled: dict[str, Any] = parse(RunConfig, values).model_dump(mode="json")
    except ConfigError:
        return values
    return filled


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _flat(value, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), values
