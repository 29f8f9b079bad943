"""Events on their way to one receiver: in order, each at least once, never in the way of learning.

An event has an index, counted over the whole stream, which follows from the journal: an event that comes again after a
restart has the index it had. What waits is kept in memory and, before every snapshot, on the disk (RUN_DIR/
outbox.json), so a restart sends what was not sent. The last event that was sent may be sent twice, if the process ends
before that is written down: the receiver drops an index that it knows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import Field, JsonValue

from cluster.redaction import one_line
from cluster.storage import read_as
from jobs.streaming.outcome import Event
from simmatch.config import Frozen, NonNegativeInt
from simmatch.files import write_whole

FILE = "outbox.json"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
CLOSE_S = 5.0
"""Longest wait, at the end, for what still waits; the rest is sent at the next start."""


class EventRefused(Exception):
    """The receiver will never take this event."""


class Message(Frozen):
    """What a receiver gets."""

    stream: str
    index: int
    kind: str
    number: int
    time: float
    text: str
    fields: dict[str, JsonValue]


class Waiting(Frozen):
    """What is kept of one receiver.

    Attributes
    ----------
    last: index of the newest event that was ever put in; −1 if there was none.
    dropped: events that were never sent, as too many waited or the receiver refused them.
    """

    last: int = -1
    dropped: NonNegativeInt = 0
    messages: list[Message] = Field(default_factory=list)


class Kept(Frozen):
    """What the file holds, by receiver."""

    receivers: dict[str, Waiting] = Field(default_factory=dict)


def message_of(stream: str, event: Event) -> Message:
    """What is sent of an event."""
    return Message(
        stream=stream,
        index=event.index,
        kind=event.kind,
        number=event.number,
        time=event.time,
        text=event.text,
        fields=dict(event.fields),
    )


class Outbox:
    """Sends messages to one receiver, in a thread of its own.

    Parameters
    ----------
    name: of the receiver, in messages and in the file.
    send: sends one; raises EventRefused where the receiver will never take it, and any other error where it may later.
    most: messages that wait; of more, the oldest faults are dropped, then the oldest others.
    tell: is given one line when the receiver does not answer, and when it does again.
    """

    def __init__(
        self, name: str, send: Callable[[Message], None], most: int, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.name, self.sent = name, 0
        self._send, self._most, self._tell = send, most, tell
        self._waiting: deque[Message] = deque()
        self._last, self._dropped = -1, 0
        self._failing = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"events-{name}", daemon=True)

    @property
    def dropped(self) -> int:
        """Events that were never sent, since the stream began."""
        return self._dropped

    @property
    def waiting(self) -> int:
        """Events that are not sent yet."""
        return len(self._waiting)

    def start(self, kept: Waiting = Waiting()) -> None:  # noqa: B008  # immutable
        """Begin to send, with what an earlier process has left."""
        self._last, self._dropped, self._waiting = kept.last, kept.dropped, deque(kept.messages)
        self._trim()
        self._thread.start()

    def put(self, messages: Iterable[Message]) -> None:
        """Take messages, and return at once; those that came before are left out."""
        with self._changed:
            for message in messages:
                if message.index > self._last:
                    self._waiting.append(message)
                    self._last = message.index
            self._trim()
            self._changed.notify_all()

    def kept(self) -> Waiting:
        """What has to be on the disk for a later process to go on."""
        with self._changed:
            return Waiting(last=self._last, dropped=self._dropped, messages=list(self._waiting))

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait until all is sent, or for `limit_s`, and send no more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, limit_s if not self._failing else 0.0)
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                message = self._waiting[0]
            try:
                self._send(message)
            except EventRefused as error:
                self._say(f"{self.name} refuses event {message.index}, which is dropped: {error}")
                self._done(message, dropped=1)
            except Exception as error:  # whatever the network raises: it is tried again
                if not self._failing:
                    self._say(f"{self.name} takes no events: {error}; they are kept and sent again")
                with self._changed:
                    self._failing = True
                    self._changed.wait_for(lambda: self._closing, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._done(message)
                pause_s = FIRST_PAUSE_S
                if self._failing:
                    self._failing = False
                    self._say(
                        f"{self.name} takes events again" + (f", without {self._dropped}" if self._dropped else "")
                    )

    def _done(self, message: Message, dropped: int = 0) -> None:
        with self._changed:
            if self._waiting and self._waiting[0] is message:  # else it was dropped meanwhile
                self._waiting.popleft()
            self.sent += not dropped
            self._dropped += dropped
            self._changed.notify_all()

    def _trim(self) -> None:
        while len(self._waiting) > self._most:
            oldest = next((index for index, message in enumerate(self._waiting) if message.kind == "fault"), 0)
            del self._waiting[oldest]
            self._dropped += 1

    def _say(self, line: str) -> None:
        self._tell(one_line(line))


def load(run_dir: Path) -> Kept:
    """What the file of a run directory holds; nothing where there is none, or it is not ours."""
    try:
        return read_as(Kept, run_dir / FILE) or Kept()
    except OSError:
        return Kept()


def write(run_dir: Path, outboxes: Sequence[Outbox]) -> None:
    """Write the file.

    Raises
    ------
    OSError
        The disk did not take it; the older file is unchanged.
    """
    kept = Kept(receivers={outbox.name: outbox.kept() for outbox in outboxes})
    write_whole(run_dir / FILE, kept.model_dump_json())
