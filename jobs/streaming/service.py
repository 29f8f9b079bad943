"""The loop of a stream: source → journal → acknowledge → pipeline → what is seen, and snapshots between batches.

    append        a record goes into the journal's memory
    sync          … and to the disk, at the latest `journal.sync_ms` later, and at the end of a batch
    acknowledge   the source need not deliver it again
    apply         a batch, once it is full or its first record has waited for `max_wait_s`
    snapshot      after some batches, and at the end

Killed between any two of these, the stream goes on: what was not synced comes again, what was synced is applied again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from jobs.streaming.config import StreamConfig
from jobs.streaming.entries import Boundary, Entry, Why
from jobs.streaming.journal import Journal
from jobs.streaming.keeper import Keeper
from jobs.streaming.ledger import Batch
from jobs.streaming.outcome import Outcome, Usage
from jobs.streaming.records import Delivery, Source
from jobs.streaming.set_aside import SetAsideFile
from jobs.streaming.state import StreamState

POLL_S = 0.25
"""Longest wait for the source, so that signals are answered."""

MOST_POLLED = 1024
"""Deliveries at a time."""

AGAIN_S = 1.0
"""Between two attempts at a full disk."""


class Watcher(Protocol):
    """Who is told of every outcome, also of those that are applied again after a restart."""

    def add(self, outcome: Outcome, usage: Usage) -> None:
        """A batch was applied."""

    def idle(self) -> None:
        """There is nothing to apply at the moment."""

    def sync(self) -> None:
        """A snapshot follows: what was added must not get lost."""


class StoppedError(Exception):
    """The job was asked to end while the disk took nothing."""


class Service:
    """Runs a stream in this thread: `catch_up`, then `run`.

    Parameters
    ----------
    journal: open.
    seen: is told of outcomes.
    tell: shows a line.
    point: called with a name before each of the steps above; for tests, which end the process there.

    Attributes
    ----------
    state: what follows from the journal.
    duplicates: records and labels that came again.
    stopping: set it to end the job.
    """

    def __init__(
        self,
        config: StreamConfig,
        run_dir: Path,
        journal: Journal,
        seen: Watcher,
        tell: Callable[[str], None],
        *,
        point: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.journal = config, journal
        self._seen, self._tell, self._point = seen, tell, point
        self.state = StreamState(config, tell)
        self.duplicates = 0
        self.stopping = threading.Event()
        self._aside = SetAsideFile(run_dir, tell)
        self._keeper = Keeper(config, run_dir, journal, tell)
        self._source: Source | None = None
        self._most = config.batch_size * config.samples_per_window
        self._unacknowledged: list[Delivery] = []
        self._came_s: float | None = None
        """When the first record of the batch came."""
        self._unsynced_s: float | None = None
        """When the first entry that is not on the disk came."""

    def catch_up(self, restored: Callable[[], None] = lambda: None) -> None:
        """Restore the newest good snapshot, and apply what the journal holds since.

        restored: is called in between.

        Raises
        ------
        JournalError
            An entry is damaged or missing.
        """
        snapshot = self._keeper.newest()
        if snapshot is not None:
            self.state.restore(snapshot)
        restored()
        for number, entry in self.journal.read(self.state.ledger.entries):
            batch = self.state.take(number, entry)
            if batch is not None:
                self._apply(batch, None)
            if self.stopping.is_set():
                break

    @property
    def digest(self) -> str:
        """Of the state, between two batches."""
        return self.state.snapshot(self.journal.stream).digest

    def close(self, limit_s: float) -> None:
        """Wait for copies of snapshots, at most so long."""
        self._keeper.close(limit_s)

    def run(self, source: Source) -> None:
        """Until the source has ended or `stopping` is set; then a last batch and a snapshot.

        source: opened with the positions of the ledger.

        Raises
        ------
        SourceError
            The source can never be read again.
        """
        self._source = source
        if self.state.ledger.open:
            self._came_s = time.monotonic()
        try:
            while not self.stopping.is_set():
                deliveries = source.poll(min(MOST_POLLED, self._most), self._wait_s())
                for delivery in deliveries:
                    self._take(delivery)
                if not deliveries:
                    if source.ended:
                        break
                    self._seen.idle()
                self._look_at_clock()
            if self.state.ledger.open or not self._keeper.has(self.state.ledger.batches):
                self._end("end")
            else:
                self._sync()
        except StoppedError:
            self._tell("ended while the disk took nothing: what was not acknowledged comes again")

    def _wait_s(self) -> float:
        """Until the next deadline."""
        now = time.monotonic()
        deadlines = [
            since + limit
            for since, limit in (
                (self._came_s, self.config.max_wait_s),
                (self._unsynced_s, self.config.journal.sync_ms / 1000),
            )
            if since is not None
        ]
        return max(0.0, min([POLL_S, *(each - now for each in deadlines)]))

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if self._came_s is not None and now >= self._came_s + self.config.max_wait_s:
            self._end("deadline")
        elif self._unsynced_s is not None and now >= self._unsynced_s + self.config.journal.sync_ms / 1000:
            self._sync()

    def _take(self, delivery: Delivery) -> None:
        """Append a delivery to the journal, unless it is known; end the batch that it fills."""
        self._unacknowledged.append(delivery)
        now = time.monotonic()
        self._unsynced_s = self._unsynced_s or now
        if self.state.ledger.knows(delivery.item):
            self.duplicates += 1
            self.state.ledger.note(delivery.position)
            return
        self._append(Entry(delivery.item, delivery.position))
        self._came_s = self._came_s or now
        if self.state.ledger.size >= self._most:
            self._end("full")

    def _append(self, entry: Entry) -> Batch | None:
        self._point("append")
        return self.state.take(self.journal.append(entry), entry)

    def _sync(self) -> None:
        """Bring the journal to the disk, however long that takes, then acknowledge.

        Raises
        ------
        StoppedError
            The disk takes nothing, and the job is to end.
        """
        self._point("sync")
        told = False
        while True:
            try:
                self.journal.sync()
                break
            except OSError as error:
                if not told:
                    self._tell(f"{self.journal.folder} takes nothing: {error.strerror}; the source waits until it does")
                told = True
                if self.stopping.wait(AGAIN_S):
                    raise StoppedError from None
        if told:
            self._tell(f"{self.journal.folder} is written again")
        self._point("acknowledge")
        self._unsynced_s = None
        done, self._unacknowledged = self._unacknowledged, []
        if done:
            assert self._source is not None
            self._source.acknowledge(done)

    def _end(self, why: Why) -> None:
        """End the batch: sync, acknowledge, apply; then a snapshot, if it is due."""
        came_s, self._came_s = self._came_s, None
        batch = self._append(Entry(Boundary(self.state.ledger.batches + 1, why)))
        assert batch is not None
        self._sync()
        self._point("apply")
        self._apply(batch, came_s)
        if self.state.due(batch):
            self._point("snapshot")
            self._seen.sync()
            self._keeper.save(self.state.snapshot(self.journal.stream), self._source)

    def _apply(self, batch: Batch, came_s: float | None) -> None:
        started_s = time.monotonic()
        outcome = self.state.pipeline.apply(batch)
        now = time.monotonic()
        usage = Usage(
            seconds=dict(self.state.pipeline.seconds),
            wall_s=now - started_s,
            lag_s=None if came_s is None else now - came_s,
            journal_bytes=self.journal.nbytes,
            duplicates=self.duplicates,
        )
        self._aside.add(outcome.set_aside)
        self._seen.add(outcome, usage)
