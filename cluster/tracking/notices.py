"""Messages to the user about tracking while a job runs: one for each reason of a failure, and one when it is over."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

REPORT_AFTER_S = 10.0
"""A shorter failure is not reported: the next attempt follows."""
SILENCE_S = 30.0
"""A request without an answer for so long is reported as a failure."""

# what differs from one failure to the next of the same reason: requests, ids, addresses
_PASSING = re.compile(r"/\S*|\b(?:0x)?[0-9a-f]{8,}\b")


class Notices:
    """Lines about one server. Its methods may be called from any thread.

    Parameters
    ----------
    destination: the server, without credentials.
    clock: seconds, as of `time.monotonic`.
    """

    def __init__(self, destination: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._destination = destination
        self._clock = clock
        self._lock = threading.Lock()
        self._tell: Callable[[str], None] | None = None
        self._waiting: list[str] = []
        self._failing_since: float | None = None
        self._failures: set[str] = set()
        self._refusals: set[str] = set()

    def listen(self, tell: Callable[[str], None]) -> None:
        """From here on `tell` is called with each line, and at once with those that nobody has heard yet."""
        with self._lock:
            self._tell = tell
            waiting, self._waiting = self._waiting, []
            for line in waiting:
                self._say(line)

    def failing(self, reason: str) -> None:
        """Nothing can be sent at the moment."""
        with self._lock:
            now = self._clock()
            if self._failing_since is None:
                self._failing_since = now
            if now - self._failing_since >= REPORT_AFTER_S and _new(reason, self._failures):
                self._say(f"MLflow at {self._destination} takes no records: {reason}; the job continues, they are kept")

    def working(self) -> None:
        """Something was sent."""
        with self._lock:
            self._failing_since = None
            if self._failures:
                self._failures.clear()
                self._say(f"MLflow at {self._destination} takes records again")

    def refused(self, notes: Iterable[str]) -> None:
        """Events will never be in MLflow; `notes` say why."""
        with self._lock:
            for note in notes:
                if _new(note, self._refusals):
                    self._say(f"not recorded in MLflow: {note}")

    def _say(self, line: str) -> None:
        if self._tell is None:
            self._waiting.append(line)
            return
        with suppress(OSError, ValueError):  # a terminal that is gone, or cannot show the line, does not stop sending
            self._tell(line)


def _new(text: str, known: set[str]) -> bool:
    """Whether a reason is not among the known ones; it is from here on."""
    reason = _PASSING.sub("", text)
    if reason in known:
        return False
    known.add(reason)
    return True
