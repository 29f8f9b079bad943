"""The copy of a spool in an object store, which takes whole files only: parts that each hold some of its lines.

    RUN_DIR/events/000000000000-000000004096.jsonl   bytes 0 … 4095 of the spool
    RUN_DIR/events/000000004096-000000004352.jsonl   the next; …
    RUN_DIR/events.jsonl                             the spool of a run that has ended, in place of its parts

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
NAME = re.compile(r"(\d{12})-(\d{12})\.jsonl")


@dataclass(frozen=True)
class Part:
    """Bytes start … stop − 1 of the spool, and the file that holds them."""

    start: int
    stop: int
    path: AnyPath


class SpoolParts:
    """Uploads what is new in a spool, and reads it all.

    Parameters
    ----------
    run_dir: in the object store.
    """

    def __init__(self, run_dir: AnyPath) -> None:
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
        self._parts, self._unused = [], []
        for path in find(self._folder, "*.jsonl"):
            if (name := NAME.fullmatch(path.name)) is None:
                continue
            start, stop = int(name[1]), int(name[2])
            if start > len(content):
                self._unused.append(path)
            elif len(content) < stop and len(content) < start + len(lines := _lines(read(path))):
                content = content[:start] + lines
                if len(content) == stop:  # a torn part stays as it is, and the next one begins within it
                    self._parts.append(Part(start, stop, path))
        self._size_bytes = len(content)
        return content

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
        part = Part(start, stop, self._folder / f"{start:012d}-{stop:012d}.jsonl")
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
        remove(self._folder)
        return len(content)


def _lines(content: bytes) -> bytes:
    """Without what follows the last newline."""
    return content[: content.rfind(b"\n") + 1]
