"""The journal: what came, in the order in which it came, and where batches end. All else follows from it.

    RUN_DIR/journal/0000000000000000.journal   entries 0 … 41,233
    RUN_DIR/journal/0000000000041234.journal   the next; …

A file begins with one line of JSON, and holds entries as in `jobs.streaming.entries`. `append` keeps an entry in
memory; `sync` writes all that were kept, and returns once they are on the disk. A record is acknowledged to its source
only after that, so what a crash cuts off comes again.

Behind that line stands how much of the file is known to be on the disk, written after each sync and brought to the disk
by the next one. What is damaged before that point was acknowledged, and is an error; what is not whole behind it was
left by a crash, and is cut off.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jobs.streaming.entries import FRAME, HEAD, MOST_BYTES, Entry, decode, encode, sound
from simmatch.files import make_folder, sync_folder, write_whole

SUFFIX = ".journal"
FORMAT = 2
SYNCED = struct.Struct("<QI")
"""Bytes of a file that were synced, and their checksum."""


class JournalError(RuntimeError):
    """The journal is damaged, or of another stream. The one-line message names the file."""


@dataclass(frozen=True)
class Segment:
    """One file.

    Attributes
    ----------
    stream: that it belongs to.
    first: number of its first entry; start: bytes before it.
    synced: bytes that are known to have been on the disk; what is damaged there was acknowledged.
    """

    path: Path
    stream: str
    first: int
    start: int
    synced: int


class Journal:
    """Appends to the newest file; one process at a time.

    Parameters
    ----------
    folder: of the files.
    segment_bytes: a file that is so large is followed by another.

    Attributes
    ----------
    stream: a random name, the same in all files and snapshots of a stream.
    count: number of entries so far, with those that are not synced: that of the next one.
    cut_bytes: that `open` has cut off at the end: entries that a crash left unfinished.
    """

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        self.folder, self._segment_bytes = folder, segment_bytes
        self.stream = uuid.uuid4().hex
        self.count = self.cut_bytes = 0
        self._segments: list[Segment] = []
        self._file: BinaryIO | None = None
        self._end = 0
        self._kept: list[bytes] = []
        self._before_bytes = 0

    @property
    def first(self) -> int:
        """Number of the oldest entry that is left."""
        return self._segments[0].first if self._segments else 0

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return self._before_bytes + self._end

    @property
    def synced(self) -> bool:
        """Whether everything appended is on the disk."""
        return not self._kept

    def open(self) -> None:
        """Find the files, and cut off what a crash left unfinished.

        Raises
        ------
        JournalError
            A file is damaged, or they belong to several streams.
        OSError
            The disk cannot be read or written.
        """
        make_folder(self.folder)
        self._segments = list_segments(self.folder)
        if not self._segments:
            return
        self.stream = self._segments[0].stream
        last = self._segments[-1]
        self._file = last.path.open("r+b")
        self.count, self._end = last.first, last.start
        for payload in _payloads(self._file, last):
            self.count, self._end = self.count + 1, self._end + FRAME.size + len(payload)
        self.cut_bytes = os.fstat(self._file.fileno()).st_size - self._end
        if self.cut_bytes:
            self._file.truncate(self._end)
        os.fsync(self._file.fileno())  # entries that a process was killed before it could sync
        self._note_synced()
        self._before_bytes = sum(segment.path.stat().st_size for segment in self._segments[:-1])

    def append(self, entry: Entry) -> int:
        """Keep an entry for the next `sync`; returns its number."""
        self._kept.append(encode(entry, self.count))
        self.count += 1
        return self.count - 1

    def sync(self) -> None:
        """Bring everything appended so far to the disk.

        Raises
        ------
        OSError
            The disk is full or gone. What was appended is kept: try again at any time.
        """
        if not self._kept:
            return
        if self._file is None or self._end >= self._segment_bytes:
            self._begin_segment(self.count - len(self._kept))
        assert self._file is not None
        content, end = memoryview(b"".join(self._kept)), self._end
        try:
            while content:
                written = os.pwrite(self._file.fileno(), content, end)
                content, end = content[written:], end + written
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # after a failed sync, what the disk holds is unknown: it is written anew
                self._file.truncate(self._end)
            raise
        self._end = end
        self._kept.clear()
        with suppress(OSError):  # the one before is true as well
            self._note_synced()

    def _note_synced(self) -> None:
        """Write how much is on the disk; the next sync brings it there."""
        assert self._file is not None
        os.pwrite(self._file.fileno(), _synced(self._end), self._segments[-1].start - SYNCED.size)

    def _begin_segment(self, first: int) -> None:
        path = self.folder / f"{first:016d}{SUFFIX}"
        line = json.dumps({"format": FORMAT, "stream": self.stream, "first": first}).encode() + b"\n"
        start = len(line) + SYNCED.size
        write_whole(path, line + _synced(start))
        if self._file is not None:
            self._file.close()
        self._before_bytes += self._end
        self._segments.append(Segment(path, self.stream, first, start, start))
        self._file, self._end = path.open("r+b"), start

    def read(self, first: int = 0) -> Iterator[tuple[int, Entry]]:
        """Entries that are on the disk, from number `first` on.

        Raises
        ------
        JournalError
            An entry is damaged, or missing.
        """
        yield from read_entries(self._segments, first)

    def remove_before(self, number: int) -> bool:
        """Remove the oldest file, if it holds only entries before `number`; returns whether it did."""
        if len(self._segments) < 2 or self._segments[1].first > number:
            return False
        oldest = self._segments[0].path
        size = oldest.stat().st_size
        oldest.unlink()
        sync_folder(self.folder)
        del self._segments[0]
        self._before_bytes -= size
        return True

    def close(self) -> None:
        """Release the file; what is not synced is lost."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._kept.clear()


def list_segments(folder: Path) -> list[Segment]:
    """The files of a journal, oldest first.

    Raises
    ------
    JournalError
        One is damaged, or they belong to several streams.
    """
    found: list[Segment] = []
    for path in sorted(folder.glob(f"{'[0-9]' * 16}{SUFFIX}")):
        with path.open("rb") as file:
            line, mark = file.readline(65536), file.read(SYNCED.size)
        head = _head(line)
        if head is None or head.get("format") != FORMAT or head.get("first") != int(path.stem):
            raise JournalError(f"{path}: expected a file of a journal of format {FORMAT}, got {line[:80]!r}")
        start = len(line) + SYNCED.size
        segment = Segment(path, str(head.get("stream")), int(path.stem), start, _synced_of(mark, start))
        if found and segment.stream != found[0].stream:
            raise JournalError(
                f"{path}: expected the journal of stream {found[0].stream}, got that of {segment.stream}"
            )
        found.append(segment)
    return found


def read_entries(segments: list[Segment], first: int = 0) -> Iterator[tuple[int, Entry]]:
    """Entries of these files from number `first` on; of the last file, what was not synced up to the first one that is
    not whole.

    Raises
    ------
    JournalError
        An entry is damaged, or missing.
    """
    if segments and first < segments[0].first:
        raise JournalError(f"{segments[0].path}: expected entry {first} or an earlier one first, they were removed")
    for index, segment in enumerate(segments):
        following = segments[index + 1].first if index + 1 < len(segments) else None
        if following is not None and following <= first:
            continue
        number = segment.first
        with segment.path.open("rb") as file:
            for payload in _payloads(file, segment):
                if number >= first:
                    yield number, decode(payload)
                number += 1
        if following is not None and number != following:
            raise JournalError(f"{segment.path}: expected entries up to {following - 1}, got {number} damaged")


def _payloads(file: BinaryIO, segment: Segment) -> Iterator[bytes]:
    """Payloads of a file's entries, up to the first one that is not whole.

    Raises
    ------
    JournalError
        That one was synced.
    """
    file.seek(segment.start)
    number, end = segment.first, segment.start
    while (payload := _payload(file, number)) is not None:
        yield payload
        number, end = number + 1, end + FRAME.size + len(payload)
    if end < segment.synced:
        behind = f"where {segment.synced} bytes were on the disk"
        raise JournalError(f"{segment.path}: expected entry {number} at byte {end}, got it damaged, {behind}")


def _payload(file: BinaryIO, number: int) -> bytes | None:
    """The payload of the next entry; None: it is not whole."""
    frame = file.read(FRAME.size)
    if len(frame) < FRAME.size:
        return None
    length, checksum = FRAME.unpack(frame)
    if not HEAD.size <= length <= MOST_BYTES:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and sound(payload, checksum, number) else None


def _synced(end: int) -> bytes:
    return SYNCED.pack(end, zlib.crc32(end.to_bytes(8, "little")))


def _synced_of(mark: bytes, start: int) -> int:
    """What `_synced` was given; of a damaged one the least that it can be."""
    if len(mark) < SYNCED.size:
        return start
    end, _ = SYNCED.unpack(mark)
    return end if mark == _synced(end) else start


def _head(line: bytes) -> dict[str, Any] | None:
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) else None
