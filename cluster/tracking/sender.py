"""Runs a delivery in background threads: attempts that hang are abandoned, those that fail are repeated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from cluster.tracking.delivery import Delivery, Sink
from cluster.tracking.notices import SILENCE_S, Notices

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
STALLED_S = 300.0
MOST_STALLED = 4


class AbandonedError(Exception):
    """This attempt was abandoned while it waited; its work is repeated, or left to `jobs.sync`."""


OpenSink = Callable[[Callable[[], None]], AbstractContextManager[Sink]]
"""(function to call before each request) → context that holds the sink."""


@dataclass(eq=False)
class Attempt:
    """One connection to the sink, in a thread of its own, so that it can be abandoned."""

    busy_since: float | None = None
    """When the present request began; None while there is nothing to send."""

    abandoned: bool = False
    finished: bool = False
    """Whether everything is sent, or the time is up: no further attempt is needed."""

    ended: threading.Event = field(default_factory=threading.Event)

    def stalled(self, limit_s: float) -> bool:
        """Whether one request has taken longer than that."""
        since = self.busy_since
        return since is not None and time.monotonic() - since > limit_s


class Sender:
    """Sends until it is closed.

    A server that answers byte by byte resets a client's time-outs with each byte, and the driver of a data base may
    have none. So each attempt has a thread of its own: one that hangs is abandoned. It stays behind (a daemon, so it
    does not hold up the process) and changes nothing any more.

    Parameters
    ----------
    delivery
        What to send.
    open_sink
        Holds the sink; entered in the thread that sends, where slow imports do no harm.
    settings
        Entered once, around all attempts.
    stalled_s
        A request that takes longer is abandoned.
    told
        Lines of the sink about what it has sent.

    Attributes
    ----------
    last_error: why the latest attempt failed; None once one succeeds.
    notices: reports failures, and their end, to its listener.
    """

    def __init__(
        self,
        delivery: Delivery,
        open_sink: OpenSink,
        *,
        settings: Callable[[], AbstractContextManager[object]] = nullcontext,
        stalled_s: float = STALLED_S,
        told: Sequence[str] = (),
    ) -> None:
        self.told = told
        self.delivery = delivery
        self.last_error: str | None = None
        self.notices = Notices(delivery.progress.destination)
        self._open_sink, self._settings, self._stalled_s = open_sink, settings, stalled_s
        self._stalled: list[threading.Thread] = []
        self._abandoned = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")

    @property
    def reason(self) -> str:
        """Why events are left: the error of the latest attempt."""
        return self.last_error or "nothing in time"

    def wake(self) -> None:
        """There is something new to send."""
        self._wake.set()

    def close(self, deadline_s: float) -> None:
        """Ask `run` to end when all is sent, or with the first attempt that ends later than `deadline_s` from now."""
        self._deadline = time.monotonic() + deadline_s
        self._closing.set()
        self._wake.set()

    def abandon(self) -> None:
        """From here on no thread changes anything, wherever it may hang."""
        with self._lock:
            self._abandoned = True

    def run(self, on_sent: Callable[[int], None] = lambda sent: None) -> None:
        """Send until closed; transient failures are retried with growing pauses."""
        pause_s = BACKOFF_FIRST_S
        with self._settings():
            while not self._abandoned:
                sent_before = self.delivery.sent
                if self._room_for_an_attempt() and self._attempt(on_sent).finished:
                    return
                if self.delivery.sent > sent_before:
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
                with self._lock:  # an abandoned attempt saves nothing any more
                    attempt.abandoned = True
                    self.last_error = f"TimeoutError: no whole answer within {self._stalled_s:g} s"
                self._stalled.append(thread)
            if attempt.abandoned or self._abandoned:
                attempt.abandoned = True  # it makes no further request
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
                attempt.finished = self._send_until_closed(sink, attempt, on_sent)
        except AbandonedError:
            pass
        except Exception as error:  # whatever the network, the server or its client raises
            with self._lock:
                if not attempt.abandoned:
                    self.last_error = self.delivery.line(f"{type(error).__name__}: {error}")
        finally:
            attempt.ended.set()

    def _alive(self, attempt: Attempt) -> None:
        """A request begins, unless this attempt or the sender is abandoned: then it is not made."""
        if attempt.abandoned or self._abandoned:
            raise AbandonedError
        attempt.busy_since = time.monotonic()

    @contextmanager
    def _saving(self, attempt: Attempt) -> Iterator[None]:
        """Only an attempt that is not abandoned may change the position."""
        with self._lock:
            if attempt.abandoned or self._abandoned:
                raise AbandonedError
            yield

    def _send_until_closed(self, sink: Sink, attempt: Attempt, on_sent: Callable[[int], None]) -> bool:
        saving, connected = partial(self._saving, attempt), False
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            self._alive(attempt)
            connected = connected or self.delivery.connect(sink, saving)
            sent, rejected = self.delivery.send_batch(sink, saving) if connected else (0, [])
            self._alive(attempt)
            self.last_error = None
            if sent:
                self.notices.refused(rejected)
                self.notices.working()
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
