"""The copy of a spool in an object store, which takes whole files only: parts that each hold some of its lines.

    RUN_DIR/events/00000001-000000000000-000000004096.jsonl   of attempt 1: bytes 0 … 4095 of the spool
    RUN_DIR/events/00000001-000000004096-000000004352.jsonl   the next; …
    RUN_DIR/events.jsonl                                      the spool of a run that has ended, in place of its parts
    RUN_DIR/events/00000001-000000004352-000000004352.jsonl   says so

An attempt that was frozen may upload a part after another one has begun. That one has its own parts, which begin where
it began; from there on they take the place of what earlier attempts have uploaded, whenever that was.

Only new lines are uploaded. A part also takes the place of the parts before it that are not longer than itself, so a
spool of n bytes has about log n parts, and each byte is uploaded about log n times, not at every checkpoint.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import AnyPath, exists, find, read, remove, write_whole
from cluster.tracking.spool import SPOOL_NAME

FOLDER = "events"
NAME = re.compile(r"(?:(\d{8})-)?(\d{12})-(\d{12})\.jsonl")
"""Earlier versions did not number attempts."""


@dataclass(frozen=True)
class Part:
    """Bytes start … stop − 1 of an attempt's spool, and the file that holds them."""

    attempt: int
    start: int
    stop: int
    path: AnyPath


class SpoolParts:
    """Uploads what is new in a spool, and reads it all.

    Parameters
    ----------
    run_dir: in the object store.

    Attributes
    ----------
    attempt: number of the attempt that uploads, greater than those of earlier ones.
    """

    def __init__(self, run_dir: AnyPath) -> None:
        self.attempt = 0
        self._whole, self._folder = run_dir / SPOOL_NAME, run_dir / FOLDER
        self._parts: list[Part] = []
        self._unused: list[AnyPath] = []
        self._size_bytes = 0

    def read(self) -> bytes:
        """All lines in the store, of this version or an earlier one. The next `append` continues there.

        A line that is torn, such as the last of a part that a store has cut short, and what follows a gap, are left
        out. Parts that an interrupted `append` or `close` left behind add nothing.

        Raises
        ------
        OSError
            The store does not answer.
        """
        content = _lines(read(self._whole)) if exists(self._whole) else b""
        parts = sorted(self._listed(), key=lambda part: (part.attempt, part.start, part.stop))
        closed = max((part.attempt for part in parts if part.start == part.stop), default=0)
        self._parts, self._unused = [], []
        attempt = 0
        for part in parts:
            if part.attempt < closed or part.start == part.stop:
                continue
            if part.start > len(content):
                self._unused.append(part.path)
            elif part.attempt > attempt or len(content) < part.stop:
                lines = _lines(read(part.path))
                known = content[part.start : part.start + len(lines)] == lines
                if known and (
                    part.attempt == attempt or part.start + len(lines) < part.stop
                ):  # it, or its rest, is lost
                    continue
                content = content[: part.start] + lines
                attempt = part.attempt
                self._parts = [each for each in self._parts if each.stop <= part.start]
                if len(content) == part.stop:  # a torn part stays as it is, and the next one begins within it
                    self._parts.append(part)
        self._size_bytes = len(content)
        return content

    def _listed(self) -> list[Part]:
        names = [(path, NAME.fullmatch(path.name)) for path in find(self._folder, "*.jsonl")]
        return [Part(int(name[1] or 0), int(name[2]), int(name[3]), path) for path, name in names if name is not None]

    def append(self, spool: Path) -> int:
        """Upload the lines that are not in the store yet; returns the number of bytes that are there now.

        Raises
        ------
        OSError
            The store did not take them.
        """
        with spool.open("rb") as file:
            file.seek(self._size_bytes)
            new = len(_lines(file.read()))
            if new == 0:
                return self._size_bytes
            while self._unused:  # what follows a gap; new lines will fill that, and need not lead up to it
                remove(self._unused[-1])
                self._unused.pop()
            stop = self._size_bytes + new
            kept, start = list(self._parts), self._size_bytes
            while kept and kept[-1].stop - kept[-1].start <= stop - start:
                start = kept.pop().start
            file.seek(start)
            content = file.read(stop - start)
        part = Part(self.attempt, start, stop, self._path(start, stop))
        write_whole(part.path, content)
        replaced, self._parts, self._size_bytes = self._parts[len(kept) :], [*kept, part], stop
        for old in replaced:
            with suppress(OSError):  # it adds nothing
                remove(old.path)
        return stop

    def close(self, spool: Path) -> int:
        """Upload the whole spool in place of its parts; returns its size in bytes.

        Raises
        ------
        OSError
            The store did not take it.
        """
        content = _lines(spool.read_bytes())
        write_whole(self._whole, content)
        self._parts, self._size_bytes = [], len(content)
        if self.attempt:
            closed = self._path(len(content), len(content))
            write_whole(closed, b"")
            for path in find(self._folder, "*"):
                if path.name != closed.name:
                    remove(path)
        else:
            remove(self._folder)
        return len(content)

    def _path(self, start: int, stop: int) -> AnyPath:
        return self._folder / f"{f'{self.attempt:08d}-' if self.attempt else ''}{start:012d}-{stop:012d}.jsonl"


def _lines(content: bytes) -> bytes:
    """Without what follows the last newline."""
    return content[: content.rfind(b"\n") + 1]
