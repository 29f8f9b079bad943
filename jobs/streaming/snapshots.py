"""Snapshots: the whole state between two batches, so that a restart applies only what the journal holds since.

    RUN_DIR/snapshots/00000200/state.safetensors   tensors
    RUN_DIR/snapshots/00000200/snapshot.json       the rest, and the digest of both; it is written last

The number is that of the batch. A snapshot is good if its digest is that of its content; there is no pickle in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.streaming.journal import JournalError
from jobs.streaming.records import Position
from simmatch.files import write_whole
from simmatch.online.state import digest, load_state, save_state

FORMAT = 1
STATE, PLAIN = "state.safetensors", "snapshot.json"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state after a batch.

    Attributes
    ----------
    stream: name of the journal's stream.
    batch: number of the batch.
    entries: of the journal up to its end.
    tensors, plain: the state; plain values are those of JSON.
    positions: of the source; no part of the digest, as they say where records lay and not what they were.
    """

    stream: str
    batch: int
    entries: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    positions: Mapping[str, Position]

    @property
    def digest(self) -> str:
        """Of the state: equal if and only if all of it is, to the last bit; 32 hexadecimal digits."""
        plain = json.dumps(self.plain, sort_keys=True)
        return sha256(f"{digest(self.tensors)} {plain}".encode()).hexdigest()[:32]


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot; it is there, whole, when this returns.

    Raises
    ------
    OSError
        The disk is full or gone.
    """
    path = folder / f"{snapshot.batch:08d}"
    save_state(snapshot.tensors, path / STATE)
    head = {
        "format": FORMAT,
        "stream": snapshot.stream,
        "batch": snapshot.batch,
        "entries": snapshot.entries,
        "digest": snapshot.digest,
        "positions": dict(snapshot.positions),
        "state": snapshot.plain,
    }
    write_whole(path / PLAIN, json.dumps(head))
    return path


def load(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises
    ------
    ValueError
        It is damaged, or not of this version; one line that names it.
    """
    try:
        head = json.loads((path / PLAIN).read_bytes())
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}")
        tensors = load_state(path / STATE)
        snapshot = Snapshot(head["stream"], head["batch"], head["entries"], tensors, head["state"], head["positions"])
        if snapshot.digest != head["digest"]:
            raise ValueError("content that has changed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a snapshot of format {FORMAT}, got {_reason(error)}") from None
    return snapshot


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "one that cannot be read"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def listed(folder: Path) -> list[Path]:
    """Whole snapshots, good or not, oldest first."""
    return [path.parent for path in sorted(folder.glob(f"{'[0-9]' * 8}/{PLAIN}"))]


def newest_good(folder: Path, stream: str, entries: int, tell: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that is good.

    Parameters
    ----------
    stream, entries: name of the journal, and how many entries it has.
    tell: is given one line for each snapshot that is damaged.

    Raises
    ------
    JournalError
        It is not of this journal, or of more entries than are left of it: records that were acknowledged are missing.
    """
    for path in reversed(listed(folder)):
        try:
            snapshot = load(path)
        except ValueError as error:
            tell(f"{error}; an earlier one serves")
            continue
        if snapshot.stream != stream:
            raise JournalError(f"{path}: expected a snapshot of journal {stream}, got that of {snapshot.stream}")
        if snapshot.entries > entries:
            raise JournalError(f"{path}: expected a journal of at least {snapshot.entries} entries, got {entries}")
        return snapshot
    return None


def keep_newest(folder: Path, keep: int) -> None:
    """Remove all snapshots but the newest ones, and what interrupted ones have left."""
    paths = listed(folder)
    for path in paths[:-keep]:
        with suppress(OSError):
            (path / PLAIN).unlink()  # from here on it is none
    kept = {path.name for path in paths[-keep:]}
    for path in folder.glob("[0-9]" * 8):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
