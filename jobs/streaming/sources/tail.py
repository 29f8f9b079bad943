"""The lines of a file that grows, also while it is rotated: renamed and made anew, copied and truncated.

A place in the file is a byte offset, with the file's inode and a hash of its first bytes: after a restart reading goes
on in that file, whatever it is called by then, then in those that were made after it, then in the present one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from jobs.streaming.records import SourceError
from simmatch.documents import shortened

HEAD_BYTES = 1024
"""First bytes of a file that tell it from others."""

CHUNK_BYTES = 1 << 18
"""Read at a time."""


@dataclass(frozen=True)
class Line:
    """One line, without its end.

    Attributes
    ----------
    raw: the line; the beginning of it if it is too long, see `size`.
    size: bytes of the whole line.
    start, end: its offset in the file, and that of what follows.
    head: bytes and hash of the beginning of the file, up to `end` at most.
    """

    raw: bytes
    size: int
    start: int
    end: int
    inode: int
    head: tuple[int, str]


class Tail:
    """Reads the lines of a file from a place on. An incomplete last line waits.

    Parameters
    ----------
    path: the file; it may come later.
    place: `inode`, `offset` and `head` of a line read before; None: from the beginning.
    longest: bytes of a line that are kept.
    follow: False: the file is read to its end, where a line without an end counts.
    settle_s: a file that was renamed has ended once nothing has been written for so long, and another one is there.
    tell: is given one line where something else is read than was expected.
    """

    def __init__(
        self,
        path: str,
        place: Mapping[str, Any] | None = None,
        *,
        longest: int = 2**20,
        follow: bool = True,
        settle_s: float = 1.0,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._path, self._longest, self._follow, self._settle_s, self._tell = path, longest, follow, settle_s, tell
        self._place = place
        self._file = -1
        self._inode = 0
        self._offset = self._scanned = 0
        """Of what follows the last line, and of what follows the bytes read."""
        self._kept = bytearray()
        """Of the incomplete line, at most `longest` bytes and a chunk."""
        self._head: tuple[int, str] = (0, "")
        self._changed = (0, 0)
        """Size and time of the last change, at the last look."""
        self._grown_s = 0.0
        """Time of the last growth, or of the first look at a file behind this one."""
        self._renamed = False
        self.ended = False

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def first_line(self, start: int = 0) -> bytes | None:
        """The line that begins at an offset of the file that is read; None: it is not complete."""
        raw = os.pread(self._file, self._longest + 1, start)
        line, end, _ = raw.partition(b"\n")
        return line.rstrip(b"\r") if end or (raw and not self._follow) else None

    @property
    def inode(self) -> int:
        """Of the file that is read; 0: none."""
        return self._inode if self._file >= 0 else 0

    def read(self, most: int) -> list[Line]:
        """At most so many lines, without waiting; none at the end of what is there.

        Raises
        ------
        SourceError
            The file cannot be read.
        """
        try:
            lines: list[Line] = []
            while len(lines) < most and not self.ended:
                if self._file < 0 and not self._open():
                    break
                if (line := self._line()) is not None:
                    lines.append(line)
                elif not self._fill():
                    if lines or not self._turn():
                        break
                    last = self._last()
                    lines += [last] if last is not None else []
                    self._leave()
                    break  # the next lines are of another file
            return lines
        except OSError as error:
            raise SourceError(f"{shortened(self._path)}: cannot be read: {error.strerror}") from None

    def _open(self) -> bool:
        """Open the file in which reading goes on; False: there is none yet."""
        path, place, self._place = self._path, self._place, None
        if place is not None:
            found = self._find(place)
            if found is None:
                self._tell(
                    f"{shortened(self._path)}: the file that was read up to byte {place['offset']} is gone or was "
                    "written anew; reading the present one from its beginning"
                )
                place = None
            else:
                path = found
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._place = place
            if not self._follow:
                raise
            return False
        self._begin(int(place["offset"]) if place is not None else 0)
        return True

    def _begin(self, offset: int) -> None:
        self._inode = os.fstat(self._file).st_ino
        self._offset = self._scanned = offset
        self._kept.clear()
        self._head, self._renamed = (0, ""), False
        self._head = self._head_at(offset)
        self._grown_s = time.monotonic()

    def _head_at(self, offset: int) -> tuple[int, str]:
        size = min(offset, HEAD_BYTES)
        return self._head if self._head[0] == size else (size, _hash(os.pread(self._file, size, 0)))

    def _line(self) -> Line | None:
        """The next complete line of what was read."""
        stop = self._kept.find(b"\n")
        if stop < 0:
            return None
        over = self._scanned - self._offset - len(self._kept)  # bytes of a long line that were not kept
        raw = bytes(self._kept[: min(stop, self._longest)])
        del self._kept[: stop + 1]
        return self._made(raw, stop + over, stop + over + 1)

    def _last(self) -> Line | None:
        """What stands behind the last end of a line."""
        size = self._scanned - self._offset
        raw = bytes(self._kept[: self._longest])
        self._kept.clear()
        return self._made(raw, size, size) if size else None

    def _made(self, raw: bytes, size: int, length: int) -> Line:
        start, self._offset = self._offset, self._offset + length
        self._head = self._head_at(self._offset)
        return Line(raw.removesuffix(b"\r"), size, start, self._offset, self._inode, self._head)

    def _fill(self) -> bool:
        """Read on; False: there is no more at the moment."""
        status = os.fstat(self._file)
        size, changed = status.st_size, (status.st_size, status.st_mtime_ns)
        if size == self._scanned and changed == self._changed:
            return False
        self._changed = changed
        if size < self._scanned or _hash(os.pread(self._file, self._head[0], 0)) != self._head[1]:
            self._tell(f"{shortened(self._path)}: was truncated or written anew; reading it from its beginning")
            self._begin(0)
            return size > 0
        if not (chunk := os.pread(self._file, CHUNK_BYTES, self._scanned)):
            return False
        self._scanned += len(chunk)
        self._grown_s = time.monotonic()
        if len(self._kept) > self._longest and b"\n" not in self._kept:  # of a line that is too long, the beginning
            del self._kept[self._longest + 1 :]
            chunk = chunk[max(chunk.find(b"\n"), 0) :] if b"\n" in chunk else b""
        self._kept += chunk
        return True

    def _turn(self) -> bool:
        """Whether this file has ended: another one is at its path, and nobody has written to this one for a while."""
        if not self._follow:
            return True
        try:
            other = os.stat(self._path).st_ino != self._inode
        except FileNotFoundError:
            other = False  # not made yet
        if not other:
            self._renamed = False
            return False
        if not self._renamed:
            self._renamed, self._grown_s = True, time.monotonic()
        return time.monotonic() - self._grown_s >= self._settle_s

    def _leave(self) -> None:
        """Go on with the file that was made next."""
        if not self._follow:
            self.close()
            self.ended = True
            return
        after = os.fstat(self._file)
        self.close()
        between = [entry for entry in self._rotated() if entry.stat().st_ino != after.st_ino]
        later = [entry for entry in between if entry.stat().st_mtime_ns > after.st_mtime_ns]
        if later:
            self._file = os.open(
                min(later, key=lambda entry: entry.stat().st_mtime_ns).path, os.O_RDONLY | os.O_CLOEXEC
            )
            self._begin(0)

    def _find(self, place: Mapping[str, Any]) -> str | None:
        """The path of the file in which a place is: the one with its inode, or one that begins in the same way."""
        paths = [self._path, *(entry.path for entry in self._rotated())]
        known = {path: inode for path in paths if (inode := inode_with(path, place)) is not None}
        same = [path for path, inode in known.items() if inode == place["inode"]]
        whole = known if place["head"][0] == HEAD_BYTES else ()  # a few bytes may begin any file
        return next(iter([*same, *whole]), None)

    def _rotated(self) -> list[os.DirEntry[str]]:
        """Files beside it that are called as after a rotation: log.csv.1, log.csv-20260102, log.1.csv."""
        folder, name = os.path.split(self._path)
        stem, ending = os.path.splitext(name)
        number = r"[.-]\d[\dT:_.-]*"
        pattern = re.compile(rf"{re.escape(name)}{number}|{re.escape(stem)}{number}{re.escape(ending)}")
        try:
            with os.scandir(folder or ".") as entries:
                return [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_file()]
        except OSError:
            return []


def inode_with(path: str, place: Mapping[str, Any]) -> int | None:
    """The inode of a file, if a place may be in it: it is long enough, and begins as it did."""
    size, head = place["head"]
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            return status.st_ino if status.st_size >= place["offset"] and _hash(file.read(size)) == head else None
    except OSError:
        return None


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()[:16] if content else ""
