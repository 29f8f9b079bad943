"""Moves a spool's events to a sink, in order, at least once each, and remembers how far it came."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from cluster.notices import SILENCE_S, Notices
from cluster.tracking.events import sound
from cluster.tracking.spool import Event, Progress, Spool
from simmatch.documents import shortened

BATCH_EVENTS = 500
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
STALLED_S = 300.0
MOST_STALLED = 4
MOST_DOUBTS = 10
KEPT_NOTES = 20
LONGEST_NOTE = 500


class RejectedError(Exception):
    """The server, or this machine, will never accept this event: sending it again cannot help.

    Parameters
    ----------
    certain: False where a gateway may have said so while the server was away.
    """

    def __init__(self, why: str, *, certain: bool = True) -> None:
        super().__init__(why)
        self.certain = certain


class RunsLostError(Exception):
    """The server no longer knows the runs; everything has to be sent again."""


class GivenUpError(Exception):
    """This attempt was given up while it waited; what it was doing is done again, or left to `jobs.sync`."""


class Sink(Protocol):
    """Where events go. Sending an event twice must have the effect of sending it once."""

    def connect(self, start: Event, runs: dict[str, str]) -> dict[str, str]:
        """Find or make the runs of the spool whose first event is `start`; `runs` are the ids known so far."""

    def send(self, events: Sequence[Event]) -> None:
        """Deliver events; raises RejectedError, RunsLostError, or anything else for what may work later."""


OpenSink = Callable[[Callable[[], None]], AbstractContextManager[Sink]]
"""(what to call before each request) → context that holds the sink."""


@dataclass(eq=False)
class Attempt:
    """One connection to the sink, in a thread of its own, so that it can be given up."""

    busy_since: float | None = None
    """Since when nothing was heard of the request under way; None while there is nothing to send."""

    given_up: bool = False
    finished: bool = False
    """Whether all is sent, or the time is up: no further attempt is needed."""

    ended: threading.Event = field(default_factory=threading.Event)

    def alive(self) -> None:
        """A request begins."""
        if self.given_up:
            raise GivenUpError
        self.busy_since = time.monotonic()

    def stalled(self, limit_s: float) -> bool:
        """Whether one request has taken longer than that."""
        since = self.busy_since
        return since is not None and time.monotonic() - since > limit_s


class Sender:
    """Reads events after the persisted offset and hands them to the sink.

    A server that answers byte by byte resets a client's time-outs with each, and a driver of a data base may have none.
    So each attempt has a thread of its own: one that hangs is given up, stays behind (a daemon: it holds no process
    back) and changes nothing any more.

    Parameters
    ----------
    spool
        What to send.
    progress_path
        File that holds the offset; replaced atomically after each confirmed batch.
    destination
        The server, without credentials.
    open_sink
        Holds the sink; entered in the thread that sends, where slow imports do no harm.
    redact
        Removes credentials from an error's text.
    settings
        Entered once, around all attempts.
    stalled_s
        A request that takes longer is given up.
    safe_bytes
        How much of the spool is where the next process, perhaps on another machine, finds it; no more is sent.
    """

    def __init__(
        self,
        spool: Spool,
        progress_path: Path,
        destination: str,
        open_sink: OpenSink,
        redact: Callable[[str], str] = str,
        *,
        settings: Callable[[], AbstractContextManager[object]] = nullcontext,
        stalled_s: float = STALLED_S,
        safe_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.refusals: list[str] = []
        """What the server rejected, newest last, and no more of it than KEPT_NOTES."""
        self.rejected = 0
        self.sent = 0
        self.last_steps: dict[int, int] = {}
        """Layer → last step of its metrics that was confirmed."""
        self.last_error: str | None = None
        """Why the latest attempt failed; None once one succeeds."""
        self.notices = Notices(destination)
        """Says what fails, and that it works again, to whoever listens."""
        self._spool = spool
        self._progress_path = progress_path
        self._progress = Progress(destination)
        self._open_sink = open_sink
        self._redact = redact
        self._settings = settings
        self._stalled_s = stalled_s
        self._safe_bytes = safe_bytes
        self._stalled: list[threading.Thread] = []
        self._connected = False
        self._doubted: tuple[Event, int] = ({}, 0)
        self._disk_note: str | None = None
        self._given_up = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")

    @property
    def runs(self) -> dict[str, str]:
        """MLflow run ids known so far: `parent`, and each layer's under its number."""
        return self._progress.runs

    @property
    def notes(self) -> list[str]:
        """What the server rejected, and what the disk did."""
        return [*self.refusals, *([self._disk_note] if self._disk_note else [])]

    def load(self) -> None:
        """Read the persisted offset."""
        size_bytes = self._spool.size_bytes()
        self._progress = Progress.load(self._progress_path, self._progress.destination, size_bytes)
        confirmed = itertools.takewhile(lambda pair: pair[1] <= self._progress.offset, self._spool.read())
        self._keep_steps(event for event, _ in confirmed)

    def _keep_steps(self, events: Iterable[Event]) -> None:
        for event in events:
            metrics = sound(event, "metrics")
            if metrics is not None and metrics["layer"] is not None:
                self.last_steps[metrics["layer"]] = metrics["step"]

    def _safe(self, offset: int) -> Iterator[tuple[Event, int]]:
        """Events from there on that will be found again: one sent before would get another time when it is redone."""
        limit = self._safe_bytes()
        return itertools.takewhile(lambda pair: pair[1] <= limit, self._spool.read(offset))

    def pending(self) -> int:
        """Events not confirmed yet."""
        return sum(1 for _ in self._spool.read(self._progress.offset))

    @property
    def reason(self) -> str:
        """What the latest attempt said, where something is left to send."""
        return self.last_error or "nothing in time"

    def wake(self) -> None:
        """Say that there is something new."""
        self._wake.set()

    def close(self, deadline_s: float) -> None:
        """Ask `run` to end when all is sent, or with the first attempt that ends later than `deadline_s` from now."""
        self._deadline = time.monotonic() + deadline_s
        self._closing.set()
        self._wake.set()

    def give_up(self) -> None:
        """From here on nothing is changed, whatever still hangs somewhere."""
        with self._lock:
            self._given_up = True

    def run(self, on_sent: Callable[[int], None] = lambda sent: None) -> None:
        """Send until closed; transient failures are retried with growing pauses."""
        pause_s = BACKOFF_FIRST_S
        with self._settings():
            while not self._given_up:
                sent_before = self.sent
                if self._room_for_an_attempt() and self._attempt(on_sent).finished:
                    return
                if self.sent > sent_before:
                    pause_s = BACKOFF_FIRST_S
                if not self._pause(pause_s):
                    return
                pause_s = min(2 * pause_s, BACKOFF_MOST_S)

    def _room_for_an_attempt(self) -> bool:
        """Whether few enough threads hang; each costs memory and a connection for as long as it does."""
        self._stalled = [thread for thread in self._stalled if thread.is_alive()]
        return len(self._stalled) < MOST_STALLED

    def _attempt(self, on_sent: Callable[[int], None]) -> Attempt:
        """Connect and send until something fails or hangs, or all is sent and the sender closed."""
        attempt = Attempt(busy_since=time.monotonic())
        thread = threading.Thread(target=self._work, args=(attempt, on_sent), name="tracking-attempt", daemon=True)
        thread.start()
        while not attempt.ended.wait(min(1.0, self._stalled_s / 4)):
            if attempt.stalled(self._stalled_s):
                with self._lock:  # once it has given up, it saves nothing any more
                    attempt.given_up = True
                    self.last_error = f"TimeoutError: no whole answer within {self._stalled_s:g} s"
                self._stalled.append(thread)
            if attempt.given_up or self._given_up:
                attempt.given_up = True  # it makes no further request
                break
            if attempt.stalled(SILENCE_S):
                self.notices.failing(self.last_error or f"no answer within {SILENCE_S:g} s")
        if self.last_error is not None:
            self.notices.failing(self.last_error)
        return attempt

    def _work(self, attempt: Attempt, on_sent: Callable[[int], None]) -> None:
        """What an attempt's thread does."""
        try:
            with self._open_sink(partial(self._alive, attempt)) as sink:
                self._connected = False
                attempt.finished = self._send_until_closed(sink, attempt, on_sent)
        except GivenUpError:
            pass
        except Exception as error:  # whatever the network, the server or its client comes up with
            with self._lock:
                if not attempt.given_up:
                    self.last_error = self._line(f"{type(error).__name__}: {error}")
        finally:
            attempt.ended.set()

    def _alive(self, attempt: Attempt) -> None:
        """A request begins, unless this attempt, or all, is given up: a model that is traced by then is not begun."""
        if self._given_up:
            raise GivenUpError
        attempt.alive()

    def _send_until_closed(self, sink: Sink, attempt: Attempt, on_sent: Callable[[int], None]) -> bool:
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            attempt.alive()
            sent = self._send_batch(sink, attempt)
            attempt.alive()
            self.last_error = None
            on_sent(sent)
            if sent == 0:
                if closing:
                    return True
                attempt.busy_since = None
                self._wake.wait()
            if time.monotonic() > self._deadline:
                return True

    def _pause(self, pause_s: float) -> bool:
        """Wait before the next attempt; False once the deadline leaves no time for one."""
        if not self._closing.wait(pause_s):
            return True
        left_s = self._deadline - time.monotonic()
        # closing interrupts a long pause, then attempts follow one another at the shortest
        time.sleep(max(0.0, min(BACKOFF_FIRST_S, left_s)))
        return left_s > BACKOFF_FIRST_S

    def _send_batch(self, sink: Sink, attempt: Attempt) -> int:
        """Deliver up to BATCH_EVENTS events; returns how many."""
        if not self._connected and not self._connect(sink, attempt):
            return 0
        batch = list(itertools.islice(self._safe(self._progress.offset), BATCH_EVENTS))
        if not batch:
            return 0
        rejected: list[str] = []
        try:
            self._deliver(sink, [event for event, _ in batch], rejected)
        except RunsLostError:
            self._save(Progress(self._progress.destination), attempt)
            self._connected = False
            raise
        self._save(replace(self._progress, offset=batch[-1][1]), attempt)
        # counted with the batch: one that is sent again rejects the same again
        self.rejected += len(rejected)
        self.refusals = [*self.refusals, *rejected][-KEPT_NOTES:]
        self.sent += len(batch)
        self.notices.refused(rejected)
        self.notices.working()
        self._keep_steps(event for event, _ in batch)
        return len(batch)

    def _connect(self, sink: Sink, attempt: Attempt) -> bool:
        first = next(self._safe(0), None)
        if first is None:
            return False
        runs = sink.connect(first[0], self._progress.runs)
        self._save(replace(self._progress, runs=runs), attempt)
        self._connected = True
        return True

    def _deliver(self, sink: Sink, events: Sequence[Event], rejected: list[str]) -> None:
        try:
            sink.send(events)
        except RejectedError:
            for event in events:  # one bad event must not take its neighbours with it
                self._deliver_alone(sink, event, rejected)

    def _deliver_alone(self, sink: Sink, event: Event, rejected: list[str]) -> None:
        """Deliver one event, or note that it is rejected; a doubtful refusal counts once it has come often enough."""
        try:
            sink.send([event])
        except RejectedError as error:
            if not error.certain:
                before, times = self._doubted
                self._doubted = event, times + 1 if event == before else 1
                if self._doubted[1] < MOST_DOUBTS:
                    raise
            rejected.append(self._line(f"{event.get('kind')}: {error}"))

    def _line(self, text: str) -> str:
        """A message fit to be shown, whoever wrote it: a server, or a run directory's owner."""
        return shortened(self._redact(text.partition("[SQL:")[0]), LONGEST_NOTE)

    def _save(self, progress: Progress, attempt: Attempt) -> None:
        with self._lock:
            if attempt.given_up or self._given_up:
                raise GivenUpError
            self._progress = progress
            try:
                progress.save(self._progress_path)
            except OSError as error:
                # a full disk: sending goes on, and what is sent again after a crash does no harm
                self._disk_note = self._line(f"{self._progress_path.name}: {error}")
