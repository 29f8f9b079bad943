"""Where a run's files go, and whether it begins or continues.

A run directory is a folder or a URI such as s3://bucket/runs/digits. A URI has a working folder on this machine, below
`runs/remote`, for files that grow (`jobs.mirror`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.checkpoints.manifest import MANIFEST, read_manifest
from cluster.checkpoints.reader import Reader, newest_good
from cluster.config import RunConfig
from cluster.fence import Commits
from cluster.lease import RunBusyError, wait_for_holder
from cluster.storage import AnyPath, exists, locate, read
from jobs.ray_job import in_throw_away_copy
from jobs.same_run import FREE, RESULT_FREE, check_differences, check_same
from simmatch.config import ConfigError, parse
from simmatch.documents import DocumentError, load_json, load_yaml


@dataclass(frozen=True)
class RunStart:
    """A run directory, and the checkpoint to continue from if there is one.

    Attributes
    ----------
    destination: the run directory, a folder or a URI.
    newest: number of the newest entry that other attempts have made there, see `cluster.fence`.
    finished: whether the run has finished already, so that nothing is left to do.
    config: as given; keys that it leaves out and whose default has changed since are those of the run it continues.
    run_dir: the folder of this machine: the run directory itself, or the working folder of a URI.
    """

    destination: AnyPath
    resume: AnyPath | None
    note: str
    config: RunConfig
    newest: int = 0
    finished: bool = False

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
    resume: `auto` continues an unfinished run of this configuration, or names a finished one; beside finished runs of
        other configurations it starts a numbered new one, as `never` always does; anything else is a run or a
        checkpoint to begin with. An unfinished run is continued itself if no other `run_dir` is given; otherwise a new
        run begins from its newest checkpoint.

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


def find_start(config: RunConfig, run_dir: str | None, resume: str, tell: Callable[[str], None]) -> RunStart:
    """`choose` and `as_begun`, once no other attempt is at work there.

    tell: shows what is waited for.

    Raises
    ------
    ConfigError
        As `choose` does; or another attempt is at work there and does not end.
    """
    while True:
        start = as_begun(choose(config, run_dir, resume))
        try:
            if start.finished or wait_for_holder(start.destination, tell) == start.newest:
                return start
        except RunBusyError as error:
            raise ConfigError(f"--run-dir: {error}; end it, or use --resume never or another --run-dir") from None
        except OSError as error:
            raise ConfigError(f"--run-dir: expected a store that answers, got {error}") from None


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
            same, notes = check_same(config, source)
            if _status(source) != "FINISHED" and (run_dir is None or _same_place(base, source)):
                return continued(same, source, "continuing the run in", notes)
        return _from(config, base, source)
    return _numbered_run(config, base, resume)


def _numbered_run(config: RunConfig, base: AnyPath, resume: str) -> RunStart:
    """For `auto` and `never`: the run to continue, the one that has finished, or the first free number."""
    finished: RunStart | None = None
    refused: ConfigError | None = None
    for candidate in _numbered(base):
        if not exists(candidate / "config.yaml"):
            if isinstance(candidate, Path) and candidate.exists() and not candidate.is_dir():
                raise ConfigError(f"--run-dir: expected a folder, got the file {candidate}")
            newest, _ = Commits(candidate).newest()
            if newest and resume == "never":  # of a run that is about to begin
                continue
            if refused is not None:
                raise refused
            return finished or RunStart(candidate, None, f"a new run in {candidate}", config, newest)
        if resume == "never":
            continue
        ended = _status(candidate) == "FINISHED"
        try:
            same, notes = check_same(config, candidate, RESULT_FREE if ended else FREE)
        except ConfigError as error:
            refused = refused or (None if ended else error)
            continue
        if not ended:
            return continued(same, candidate, "continuing the unfinished run in", notes)
        finished, refused = RunStart(candidate, None, "already finished", same, finished=True), None
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
        good = newest_good(source, notes.append)
        if good is None:
            why = "; ".join(notes) or "it has none"
            raise ConfigError(f"--resume: expected a run with a checkpoint to begin with, got {source}: {why}")
        checkpoint = good
    elif not exists(source / MANIFEST):
        raise ConfigError(f"--resume: expected auto, never, a run directory or a checkpoint, got {source}")
    manifest = read_manifest(checkpoint)
    config = check_differences(config, manifest.config, checkpoint)
    if checkpoint is source:
        Reader(source, manifest).verify()
    fresh = next(path for path in _numbered(base) if not exists(path / "config.yaml"))
    newest, _ = Commits(fresh).newest()
    return RunStart(fresh, checkpoint, "\n".join([*notes, f"a new run in {fresh} from {checkpoint}"]), config, newest)


def _same_place(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one).rstrip("/") == str(other).rstrip("/")


def continued(config: RunConfig, run_dir: AnyPath, words: str, notes: list[str]) -> RunStart:
    """An unfinished run, from its newest sound checkpoint; the note begins with `words` and names damaged ones."""
    newest, _ = Commits(run_dir).newest()
    checkpoint = newest_good(run_dir, notes.append)
    origin = "no checkpoint: from the beginning" if checkpoint is None else f"from {checkpoint.name}"
    return RunStart(run_dir, checkpoint, "\n".join([*notes, f"{words} {run_dir}, {origin}"]), config, newest)


def _status(run_dir: AnyPath) -> str | None:
    try:
        status = load_json(read(run_dir / "summary.json")).get("status")
    except (FileNotFoundError, DocumentError, AttributeError):
        return None
    return status if isinstance(status, str) else None
