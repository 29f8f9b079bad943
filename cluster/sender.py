"""Moves a spool's events to a sink, in order, at least once each, and remembers how far it came."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cluster.spool import Event, Progress, Spool

BATCH_EVENTS = 500
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
KEPT_NOTES = 20
LONGEST_NOTE = 500


class RejectedError(Exception):
    """The server, or this machine, will never accept this event: sending it again cannot help."""


class RunsLostError(Exception):
    """The server no longer knows the runs; everything has to be sent again."""


class Sink(Protocol):
    """Where events go. Sending an event twice must have the effect of sending it once."""

    def connect(self, start: Event, runs: dict[str, str]) -> dict[str, str]:
        """Find or make the runs of the spool whose first event is `start`; `runs` are the ids known so far."""

    def send(self, events: Sequence[Event]) -> None:
        """Deliver events; raises RejectedError, RunsLostError, or anything else for what may work later."""


class Sender:
    """Reads events after the persisted offset and hands them to the sink.

    Parameters
    ----------
    spool
        What to send.
    progress_path
        File that holds the offset; replaced atomically after each confirmed batch.
    destination
        The server, without credentials.
    open_sink
        Context that holds the sink; entered in the thread that sends, where slow imports do no harm.
    redact
        Removes credentials from an error's text.
    """

    def __init__(
        self,
        spool: Spool,
        progress_path: Path,
        destination: str,
        open_sink: Callable[[], AbstractContextManager[Sink]],
        redact: Callable[[str], str] = str,
    ) -> None:
        self.notes: list[str] = []
        """What the server rejected, newest last."""
        self.rejected = 0
        self.sent = 0
        self.last_steps: dict[int, int] = {}
        """Layer → last step of its metrics that was confirmed."""
        self.last_error: str | None = None
        """Why the latest attempt failed; None once one succeeds."""
        self._spool = spool
        self._progress_path = progress_path
        self._progress = Progress(destination)
        self._open_sink = open_sink
        self._redact = redact
        self._connected = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")

    @property
    def runs(self) -> dict[str, str]:
        """MLflow run ids known so far: `parent`, and each layer's under its number."""
        return self._progress.runs

    def load(self) -> None:
        """Read the persisted offset."""
        size_bytes = self._spool.size_bytes()
        self._progress = Progress.load(self._progress_path, self._progress.destination, size_bytes)
        confirmed = itertools.takewhile(lambda pair: pair[1] <= self._progress.offset, self._spool.read())
        self._keep_steps(event for event, _ in confirmed)

    def _keep_steps(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.get("kind") == "metrics" and event.get("layer") is not None:
                self.last_steps[event["layer"]] = event["step"]

    def pending(self) -> int:
        """Events not confirmed yet."""
        return sum(1 for _ in self._spool.read(self._progress.offset))

    def wake(self) -> None:
        """Say that there is something new."""
        self._wake.set()

    def close(self, deadline_s: float) -> None:
        """Ask `run` to end when all is sent, or with the first attempt that ends later than `deadline_s` from now."""
        self._deadline = time.monotonic() + deadline_s
        self._closing.set()
        self._wake.set()

    def run(self, on_sent: Callable[[int], None] = lambda sent: None) -> None:
        """Send until closed; transient failures are retried with growing pauses."""
        pause_s = BACKOFF_FIRST_S
        while True:
            try:
                with self._open_sink() as sink:
                    self._connected = False
                    while True:
                        self._wake.clear()
                        closing = self._closing.is_set()
                        sent = self._send_batch(sink)
                        self.last_error = None
                        pause_s = BACKOFF_FIRST_S
                        on_sent(sent)
                        if sent == 0:
                            if closing:
                                return
                            self._wake.wait()
                        if time.monotonic() > self._deadline:
                            return
            except Exception as error:  # whatever the network, the server or its client comes up with
                self.last_error = self._line(f"{type(error).__name__}: {error}")
            if not self._pause(pause_s):
                return
            pause_s = min(2 * pause_s, BACKOFF_MOST_S)

    def _pause(self, pause_s: float) -> bool:
        """Wait before the next attempt; False once the deadline leaves no time for one."""
        if not self._closing.wait(pause_s):
            return True
        left_s = self._deadline - time.monotonic()
        # closing interrupts a long pause, then attempts follow one another at the shortest
        time.sleep(max(0.0, min(BACKOFF_FIRST_S, left_s)))
        return left_s > BACKOFF_FIRST_S

    def _send_batch(self, sink: Sink) -> int:
        """Deliver up to BATCH_EVENTS events; returns how many."""
        if not self._connected and not self._connect(sink):
            return 0
        batch = list(itertools.islice(self._spool.read(self._progress.offset), BATCH_EVENTS))
        if not batch:
            return 0
        try:
            self._deliver(sink, [event for event, _ in batch])
        except RunsLostError:
            self._save(Progress(self._progress.destination))
            self._connected = False
            raise
        self._save(replace(self._progress, offset=batch[-1][1]))
        self.sent += len(batch)
        self._keep_steps(event for event, _ in batch)
        return len(batch)

    def _connect(self, sink: Sink) -> bool:
        first = next(self._spool.read(0), None)
        if first is None:
            return False
        runs = sink.connect(first[0], self._progress.runs)
        self._save(replace(self._progress, runs=runs))
        self._connected = True
        return True

    def _deliver(self, sink: Sink, events: Sequence[Event]) -> None:
        try:
            sink.send(events)
        except RejectedError as error:
            if len(events) == 1:
                self.rejected += 1
                self.notes = [*self.notes, self._line(f"{events[0].get('kind')}: {error}")][-KEPT_NOTES:]
                return
            for event in events:  # one bad event must not take its neighbours with it
                self._deliver(sink, [event])

    def _line(self, text: str) -> str:
        """A message fit to be shown: one line, not too long, without credentials."""
        line = " ".join(self._redact(text).split())
        return line if len(line) <= LONGEST_NOTE else line[: LONGEST_NOTE - 1] + "…"

    def _save(self, progress: Progress) -> None:
        progress.save(self._progress_path)
        self._progress = progress
