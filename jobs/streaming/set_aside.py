"""RUN_DIR/set_aside.jsonl: what arrived and could not be used, with the reason; one line of JSON each.

It follows from the journal: each entry of it is here once, whatever is applied again. The file is bounded; beyond that,
records that were set aside are counted, and lie in the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.streaming.outcome import SetAside

NAME = "set_aside.jsonl"
MOST_BYTES = 64 * 2**20


class SetAsideFile:
    """Appends what is set aside.

    tell: is given one line where the file is full, or cannot be written.
    """

    def __init__(self, run_dir: Path, tell: Callable[[str], None], most_bytes: int = MOST_BYTES) -> None:
        self._path, self._tell, self._most_bytes = run_dir / NAME, tell, most_bytes
        self._written, self._told = self._last(), False
        self._waiting: list[SetAside] = []

    def _last(self) -> int:
        """Number of the last entry in the file; a torn line is cut off."""
        if not self._path.exists():
            return -1
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        return int(json.loads(last)["entry"]) if last else -1

    def add(self, found: Sequence[SetAside]) -> None:
        """Write those that are not in the file yet; a disk that takes nothing gets them with the next ones."""
        self._waiting += [one for one in found if one.entry > self._written]
        if not self._waiting:
            return
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            lines = b"".join(json.dumps(asdict(one)).encode() + b"\n" for one in self._waiting)
            if size + len(lines) > self._most_bytes:
                self._once(f"{self._path} is full: what is set aside from here on lies in the journal only")
            else:
                with self._path.open("ab") as file:
                    try:
                        file.write(lines)
                        file.flush()
                    except OSError:
                        file.truncate(size)
                        raise
                self._told = False
            self._written = self._waiting[-1].entry
            self._waiting.clear()
        except OSError as error:
            self._once(f"{self._path} is not written: {error.strerror}; what is set aside lies in the journal")

    def _once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._tell(text)
