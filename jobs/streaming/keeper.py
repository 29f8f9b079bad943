"""Keeps snapshots and the files of the journal that they need, and copies snapshots to another place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cluster.redaction import one_line
from cluster.storage import AnyPath, find, locate, remove, write_whole
from cluster.text import size
from jobs.streaming.config import StreamConfig
from jobs.streaming.journal import Journal
from jobs.streaming.records import Source
from jobs.streaming.snapshots import PLAIN, STATE, Snapshot, keep_newest, listed, load, newest_good, save

FOLDER = "snapshots"


class Keeper:
    """Writes and finds snapshots of a run directory, and removes what none of them needs.

    tell: shows a line; once for each thing that does not work.
    """

    def __init__(self, config: StreamConfig, run_dir: Path, journal: Journal, tell: Callable[[str], None]) -> None:
        self._config, self._folder, self._journal, self._tell = config, run_dir / FOLDER, journal, tell
        self._told = self._over = False
        self._copies = None if config.snapshot.copy_to is None else Copies(locate(config.snapshot.copy_to), tell)

    def newest(self) -> Snapshot | None:
        """The newest good one; a `JournalError` if records are missing that it has learnt from."""
        return newest_good(self._folder, self._journal.stream, self._journal.count, self._tell)

    def has(self, batch: int) -> bool:
        """Whether there is one of this batch."""
        return any(int(path.name) == batch for path in listed(self._folder))

    def save(self, snapshot: Snapshot, source: Source | None) -> None:
        """Write a snapshot; a disk that takes none costs nothing but a longer restart."""
        positions = {key: each for key, each in snapshot.positions.items() if source is None or source.needs(key)}
        try:
            path = save(self._folder, replace(snapshot, positions=positions))
            keep_newest(self._folder, self._config.snapshot.keep)
            self._trim()
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                self._tell(f"{self._folder} takes no snapshot: {error.strerror}; the journal holds all that is needed")
            return
        if self._copies is not None:
            self._copies.put(path)

    def _trim(self) -> None:
        """Remove files of the journal from before the oldest snapshot, as configured."""
        config, journal = self._config.journal, self._journal

        def too_large() -> bool:
            return config.max_bytes is not None and journal.nbytes > config.max_bytes

        if config.keep == "snapshots" or too_large():
            oldest = self._oldest()  # which reads the whole snapshot
            while (config.keep == "snapshots" or too_large()) and journal.remove_before(oldest):
                pass
        over = too_large()
        if over and not self._over:
            self._tell(
                f"{journal.folder}: {size(journal.nbytes)}, more than journal.max_bytes: snapshots need what is there; "
                "snapshot.every_batches and snapshot.keep say how much that is"
            )
        self._over = over

    def _oldest(self) -> int:
        """Entries before the oldest good snapshot that is kept; with a single one, all are needed."""
        paths = listed(self._folder)
        if len(paths) < 2:
            return 0
        with suppress(ValueError):
            return load(paths[0]).entries
        return 0

    def close(self, limit_s: float) -> None:
        """Wait for copies under way, at most so long."""
        if self._copies is not None:
            self._copies.close(limit_s)


class Copies:
    """Copies the newest snapshot to a folder or a URI, in a thread of its own; the two newest stay there."""

    def __init__(self, destination: AnyPath, tell: Callable[[str], None]) -> None:
        self._destination, self._tell = destination, tell
        self._next: Path | None = None
        self._closing = self._told = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="snapshot-copies", daemon=True)
        self._thread.start()

    def put(self, path: Path) -> None:
        """Copy this one next; one that still waits is left out."""
        with self._changed:
            self._next = path
            self._changed.notify_all()

    def close(self, limit_s: float) -> None:
        """Copy what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closing)
                path, self._next = self._next, None
                if path is None:
                    return
            try:
                self._copy(path)
                if self._told:
                    self._tell(f"{self._destination} takes snapshots again")
                self._told = False
            except OSError as error:
                if not self._told:
                    self._told = True
                    self._tell(f"{self._destination} takes no copy of a snapshot: {one_line(error)}")

    def _copy(self, path: Path) -> None:
        target = self._destination / path.name
        for name in (STATE, PLAIN):  # the last one makes it a snapshot
            write_whole(target / name, (path / name).read_bytes())
        there = sorted({found.parent.name for found in find(self._destination, f"*/{PLAIN}")})
        for name in there[:-2]:
            for part in (PLAIN, STATE):
                remove(self._destination / name / part)
