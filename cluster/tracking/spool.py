"""The spool: what a run has to tell the tracking server, one JSON object per line, and how much of it was sent."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from simmatch.documents import DocumentError, load_json
from simmatch.files import make_folder, sync_folder, write_whole

Event = dict[str, Any]
"""One line of the spool. `kind` says which, `time_ms` when it happened; the rest belongs to the kind."""

SPOOL_NAME = "events.jsonl"
PROGRESS_NAME = "events.offset"
LONGEST_LINE_BYTES = 2**20

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)


class SpoolBusyError(RuntimeError):
    """Another process writes or sends the same spool."""


class Spool:
    """An append-only file of events that outlives a crash of its writer.

    A line counts once its newline is written. What a crash left after the last newline is ignored by `read` and
    cut off by `open`. `append` hands the line to the operating system, so it survives the process; after `sync` it is
    on the disk. What an `append` that failed has left, on a full disk, is cut off by the next one.

    Parameters
    ----------
    path
        The file, made by `open` if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._end = 0
        self._torn = False

    def open(self) -> Spool:
        """Take the file for this process alone and cut off a torn last line.

        Raises
        ------
        SpoolBusyError
            Another process has it open.
        OSError
            It cannot be made or written, or is a link: cutting and appending would change another file.
        """
        make_folder(self.path.parent)
        opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = FileIO(opened, "a+")  # no copy of ours that a full disk leaves in doubt
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise OSError(errno.EINVAL, "expected a file", str(self.path))
            _lock_file(file, self.path)
            _cut_torn_line(file)
            sync_folder(self.path.parent)
        except BaseException:
            file.close()
            raise
        self._file, self._end, self._torn = file, file.seek(0, os.SEEK_END), False
        return self

    def append(self, event: Event) -> None:
        """Write one event. Numbers JSON has no word for (nan, inf) are written as strings.

        Raises
        ------
        OSError
            The disk is full or gone. The event is not in the spool; the next `append` is free to try again.
        """
        try:
            text = _ENCODER.encode(event)
        except ValueError:
            text = _ENCODER.encode(_finite(event))
        # half a surrogate pair, as in the name of a file that is no UTF-8, becomes its escape in JSON
        line = text.encode(errors="backslashreplace") + b"\n"
        with self._lock:
            if self._file is None:
                raise ValueError(f"expected an open spool, got a closed one: {self.path}")
            if self._torn:
                self._file.truncate(self._end)
            self._torn = True
            _write_all(self._file, line)
            self._torn = False
            self._end += len(line)

    def sync(self) -> int:
        """Bring all that was appended to the disk; returns how many bytes that are."""
        with self._lock:
            if self._file is None:
                raise ValueError(f"expected an open spool, got a closed one: {self.path}")
            os.fsync(self._file.fileno())
            return self._end

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """Events from a byte offset on, each with the offset of the next. Needs no `open`.

        A whole line that is not a JSON object, as a disk failure may leave, or longer than any of ours, comes as kind
        `unreadable`. What a whole object says is `cluster.tracking.events`' to check.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            length = 0
            while piece := file.readline(LONGEST_LINE_BYTES):
                length += len(piece)
                if piece.endswith(b"\n"):
                    offset += length
                    yield _parse(piece if length == len(piece) else b""), offset
                    length = 0

    def size_bytes(self) -> int:
        """Length of the file."""
        return self.path.stat().st_size

    def close(self) -> None:
        """Release the file; `read` still works."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


RunId = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]


@dataclass(frozen=True)
class Progress:
    """How far a spool was sent, and to which server."""

    destination: str
    """Where to, without credentials. What was sent to one server says nothing about another."""

    offset: int = 0
    """Bytes of the spool that the server has confirmed."""

    runs: dict[str, RunId] = field(default_factory=dict)
    """MLflow run ids: `parent`, and each layer's under its number."""

    @classmethod
    def load(cls, path: Path, destination: str, size_bytes: int) -> Progress:
        """The stored progress, or none if it is of another destination, unreadable or past the spool's end."""
        try:
            stored = TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValueError):
            return cls(destination)
        if stored.destination != destination or not 0 <= stored.offset <= size_bytes:
            return cls(destination)
        return stored

    def save(self, path: Path) -> None:
        """Replace the stored progress in one step."""
        write_whole(path, json.dumps(asdict(self)) + "\n")


def _write_all(file: FileIO, line: bytes) -> None:
    """Write a line, in as many pieces as the system takes it in."""
    while line:
        line = line[file.write(line) :]


def _lock_file(file: FileIO, path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SpoolBusyError(f"another process is writing or sending {path}") from None
    except OSError:
        return  # a file system without locks: two writers there are the user's to avoid


def _cut_torn_line(file: FileIO) -> None:
    """Truncate a file after its last newline, reading backwards block by block."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return
        position = start
    file.truncate(0)


def _parse(line: bytes) -> Event:
    try:
        event = load_json(line)
    except DocumentError:
        event = None
    return event if isinstance(event, dict) else {"kind": "unreadable"}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
