"""The spool: the events of a run, one JSON object per line, in a file that survives a crash of its writer."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from cluster.tracking.events import Event, Unreadable, event_of, line_of
from simmatch.files import make_folder, sync_folder, write_whole

SPOOL_NAME = "events.jsonl"
LONGEST_LINE_BYTES = 2**20


class SpoolBusyError(RuntimeError):
    """Another process is writing or sending the same spool."""


class Spool:
    """An append-only file of events.

    A line counts once its newline is written. Anything that a crash left after the last newline is ignored by `read`
    and cut off by `open`. `append` hands the line to the operating system, so it survives the process; after `sync` it
    is on the disk. The part of a line that a failed `append` left on a full disk is cut off by the next one.

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
        """Lock the file for this process and cut off a torn last line.

        Raises
        ------
        SpoolBusyError
            Another process has it open.
        OSError
            It cannot be created or written, or it is a link: cutting and appending would change another file.
        """
        make_folder(self.path.parent)
        opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = FileIO(opened, "a+")  # no buffer of ours, whose state a full disk would leave unknown
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

    def take_over(self) -> None:
        """Put a copy in place of the file, before `open`: a process that may still have it open, on any machine, adds
        nothing to the copy.

        Raises
        ------
        OSError
            It cannot be written.
        """
        if self.path.is_file() and not self.path.is_symlink():
            write_whole(self.path, self.path.read_bytes())

    def append(self, event: Event) -> None:
        """Write one event.

        Raises
        ------
        OSError
            The disk is full or gone. The event is not in the spool; the next `append` may be tried at any time.
        """
        line = line_of(event)
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
        """Bring everything appended so far to the disk; returns the number of bytes."""
        with self._lock:
            if self._file is None:
                raise ValueError(f"expected an open spool, got a closed one: {self.path}")
            os.fsync(self._file.fileno())
            return self._end

    def read(self, offset: int = 0) -> Iterator[tuple[Event | Unreadable, int]]:
        """Events from a byte offset on, each with the offset of the next. Does not need `open`.

        A whole line that is no event, or is longer than any of ours, becomes an `Unreadable`.
        """
        for line, end in self._lines(offset):
            yield event_of(line), end

    def count(self, offset: int = 0) -> int:
        """The number of lines from a byte offset on."""
        return sum(1 for _ in self._lines(offset))

    def _lines(self, offset: int) -> Iterator[tuple[bytes, int]]:
        """Whole lines, each with the offset of the next; those that are too long come back empty."""
        with self.path.open("rb") as file:
            file.seek(offset)
            length = 0
            while piece := file.readline(LONGEST_LINE_BYTES):
                length += len(piece)
                if piece.endswith(b"\n"):
                    offset += length
                    yield (piece if length == len(piece) else b""), offset
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


def _write_all(file: FileIO, line: bytes) -> None:
    """Write a line, in as many pieces as the operating system needs."""
    while line:
        line = line[file.write(line) :]


def _lock_file(file: FileIO, path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SpoolBusyError(f"another process is writing or sending {path}") from None
    except OSError:
        return  # a file system without locks: the user has to avoid two writers there


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
