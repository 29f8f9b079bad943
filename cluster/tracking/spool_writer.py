"""Writes a spool in a thread of its own: a disk that is slow, full or gone, or a folder that hangs, holds nobody up."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from cluster.tracking.spool import SPOOL_NAME, Event, Spool

LOST_TAG = "simmatch.lost_records"
KEPT_EVENTS = 10_000
"""Records kept in memory while the disk takes none; of more, the oldest metrics are lost."""
TELL_AFTER_S = 10.0
"""A disk that takes nothing for so long is told of."""


class SpoolWriter:
    """Appends what it is given, in order; each round of writing ends with a sync.

    Parameters
    ----------
    spool: what to write to; open before `start`.
    written: called, in the thread, after every round.

    Attributes
    ----------
    error: why the latest round failed; None once one succeeds and nothing was lost.
    lost: records that the spool will never hold.
    synced_bytes: of the spool that are on the disk, and so outlive this machine's failure.
    """

    def __init__(self, spool: Spool, written: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self.lost = 0
        self.synced_bytes: float = math.inf
        self._spool, self._written = spool, written
        self._waiting: deque[Event] = deque()
        self._lost_told = self._begun = self._ended = 0
        self._due = self._closing = self._told = self._refused = self._stuck = False
        self._in_hand: Event | None = None
        self._busy_since: float | None = None
        self._tell: Callable[[str], None] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Records that are kept in memory, the one that is being written among them."""
        return len(self._waiting) + (self._in_hand is not None)

    def start(self) -> None:
        """Begin to write; until then the spool is an earlier process's."""
        self.synced_bytes = 0
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def announce_to(self, tell: Callable[[str], None]) -> None:
        """Where a person is told, in a line, that the disk takes no records, and that it takes them again."""
        self._tell = tell

    def put(self, event: Event) -> None:
        """Write this one after those before it; returns at once."""
        with self._changed:
            self._waiting.append(event)
            self._trim()
            self._due = True
            self._changed.notify_all()
        self._announce()

    def flush(self, limit_s: float) -> bool:
        """Wait until all so far is on the disk, or the disk has refused it; returns whether it is there."""
        with self._changed:
            if self._thread is None or self._closing:
                return not self._waiting
            wanted = self._begun + 1
            self._due = True
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: self._ended >= wanted, limit_s)
            return ended and not self._waiting and not self._refused

    def close(self, limit_s: float) -> bool:
        """Write the rest and end; what cannot be written in time is lost. Returns whether the spool can be closed."""
        self.flush(limit_s)
        with self._changed:
            self._stuck = self._begun > self._ended
            self.lost += self.waiting
            self._waiting.clear()
            self._closing = True
            self._changed.notify_all()
            if self._stuck and self.error is None:
                self.error = TimeoutError(f"nothing was written within {limit_s:g} s")
        return not self._stuck

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                if self._closing:
                    break
                self._due = False
                self._begun += 1
                self._busy_since = self._busy_since or time.monotonic()
            error = self._round()
            with self._changed:
                self._refused = error is not None
                self.error = error if self._refused or self.lost == 0 else self.error
                self._busy_since = self._busy_since if self._refused else None
                self._ended = self._begun
                self._changed.notify_all()
            self._announce()
            self._written()
        if self._stuck:  # nobody else dared
            self._spool.close()

    def _round(self) -> OSError | None:
        """Write all that waits; returns what the disk says to it."""
        try:
            while (event := self._next()) is not None:
                self._spool.append(event)
                self._in_hand = None
            if self.lost > self._lost_told:
                lost = self.lost
                self._spool.append({"kind": "tags", "time_ms": round(1000 * time.time()), "values": {LOST_TAG: lost}})
                self._lost_told = lost
            self.synced_bytes = self._spool.sync()
        except OSError as error:
            with self._changed:
                if self._in_hand is not None:
                    self._waiting.appendleft(self._in_hand)
                    self._in_hand = None
                    self._trim()
            return error
        return None

    def _next(self) -> Event | None:
        with self._changed:
            self._in_hand = self._waiting.popleft() if self._waiting and not self._closing else None
            return self._in_hand

    def _trim(self) -> None:
        while len(self._waiting) > KEPT_EVENTS:
            oldest = next((i for i, event in enumerate(self._waiting) if event["kind"] == "metrics"), 0)
            del self._waiting[oldest]
            self.lost += 1

    def _announce(self) -> None:
        """Say once that the disk takes nothing, and once that it does again."""
        since, tell = self._busy_since, self._tell
        failing = since is not None and time.monotonic() - since >= TELL_AFTER_S
        if tell is None or failing == self._told:
            return
        if failing:
            self._told = True
            why = "it does not answer" if self.error is None else self.error
            tell(f"{self._spool.path.parent} takes no records: {why}; the job goes on, {KEPT_EVENTS} at most are kept")
        elif since is None:
            self._told = False
            tell(f"{SPOOL_NAME} is written again" + (f", without {self.lost} records" if self.lost else ""))
