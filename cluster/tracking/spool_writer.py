"""Writes a spool in a thread of its own: a disk that is slow, full or gone does not hold up its caller."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from cluster.text import count
from cluster.tracking.events import Event, MetricsEvent, TagsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool

LOST_TAG = "simmatch.lost_records"
KEPT_EVENTS = 10_000
"""Events kept in memory while the disk accepts none; if there are more, the oldest metrics are lost."""
REPORT_AFTER_S = 10.0
"""A disk that accepts nothing for so long is reported."""


class SpoolWriter:
    """Appends events in order; each round of writing ends with a sync.

    Parameters
    ----------
    spool: open before `start`.
    written: called, in the thread, after every round.

    Attributes
    ----------
    error: why the latest round failed; None once one succeeds and nothing was lost.
    lost: events that the spool will never hold.
    synced_bytes: length of the part of the spool that is on the disk, and so survives a failure of this machine.
    """

    def __init__(self, spool: Spool, written: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self.lost = 0
        self.synced_bytes: float = math.inf
        self._spool, self._written = spool, written
        self._waiting: deque[Event] = deque()
        self._lost_recorded = self._begun = self._ended = 0
        self._due = self._closing = self._reported = self._refused = self._stuck = False
        self._in_hand: Event | None = None
        self._busy_since: float | None = None
        self._report_to: Callable[[str], None] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Events that are kept in memory, including the one that is being written."""
        return len(self._waiting) + (self._in_hand is not None)

    def start(self) -> None:
        """Begin to write; until then, all of the spool is of earlier processes."""
        self.synced_bytes = 0
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def announce_to(self, report: Callable[[str], None]) -> None:
        """Report to `report`, in one line each, that the disk accepts no records, and that it accepts them again."""
        self._report_to = report

    def put(self, event: Event) -> None:
        """Queue an event; returns at once."""
        with self._changed:
            self._waiting.append(event)
            self._trim()
            self._due = True
            self._changed.notify_all()
        self._announce()

    def flush(self, limit_s: float) -> bool:
        """Wait until all events so far are on the disk, or refused by it; returns whether they are there."""
        with self._changed:
            if self._thread is None or self._closing:
                return not self._waiting
            wanted = self._begun + 1
            self._due = True
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: self._ended >= wanted, limit_s)
            return ended and not self._waiting and not self._refused

    def drop(self) -> None:
        """Forget the events that are not written yet."""
        with self._changed:
            self._waiting.clear()

    def close(self, limit_s: float) -> bool:
        """Write the rest and end; events that cannot be written in time are lost.

        Returns whether the spool can be closed: not if its folder hangs.
        """
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
        if self._stuck:  # `close` left it open
            self._spool.close()

    def _round(self) -> OSError | None:
        """Write all queued events; returns the error of the disk, if any."""
        try:
            while (event := self._next()) is not None:
                self._spool.append(event)
                self._in_hand = None
            if self.lost > self._lost_recorded:
                lost = self.lost
                self._spool.append(TagsEvent(time_ms=round(1000 * time.time()), values={LOST_TAG: lost}))
                self._lost_recorded = lost
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
            oldest = next((i for i, event in enumerate(self._waiting) if isinstance(event, MetricsEvent)), 0)
            del self._waiting[oldest]
            self.lost += 1

    def _announce(self) -> None:
        """Report once that the disk accepts nothing, and once that it does again."""
        since, report = self._busy_since, self._report_to
        failing = since is not None and time.monotonic() - since >= REPORT_AFTER_S
        if report is None or failing == self._reported:
            return
        if failing:
            self._reported = True
            why = "it does not answer" if self.error is None else self.error
            folder = self._spool.path.parent
            report(f"{folder} takes no records: {why}; the job continues and keeps at most {KEPT_EVENTS}")
        elif since is None:
            self._reported = False
            report(f"{SPOOL_NAME} is written again" + (f", without {count(self.lost, 'record')}" if self.lost else ""))
