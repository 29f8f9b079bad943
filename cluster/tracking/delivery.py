"""Delivers a spool's events to a sink: in order, at least once each, from the offset that was last persisted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field, TypeAdapter

from cluster.tracking.events import Event, RegisterEvent, Unreadable
from cluster.tracking.spool import Spool
from simmatch.documents import dump_json, shortened
from simmatch.files import write_whole

PROGRESS_NAME = "events.offset"
BATCH_EVENTS = 500
MOST_DOUBTS = 10
"""A refusal that may be a gateway's counts once it has come so often."""
KEPT_NOTES = 20
LONGEST_NOTE = 500


class RejectedError(Exception):
    """The server, or this machine, will never accept this event: sending it again cannot help.

    Parameters
    ----------
    certain: False if a gateway may have said so while the server was away.
    """

    def __init__(self, reason: str, *, certain: bool = True) -> None:
        super().__init__(reason)
        self.certain = certain


class RunsLostError(Exception):
    """The server no longer knows the runs; everything has to be sent again."""


class Sink(Protocol):
    """Where events go. Sending an event twice must have the effect of sending it once."""

    def connect(self, start: Event | Unreadable, runs: dict[str, str]) -> dict[str, str]:
        """Find or make the runs of the spool whose first event is `start`; `runs` are the ids known so far."""

    def send(self, events: Sequence[Event | Unreadable]) -> None:
        """Deliver events; raises RejectedError, RunsLostError, or anything else for what may work later."""


RunId = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]


@dataclass(frozen=True)
class SendProgress:
    """How far a spool was sent, and to which server."""

    destination: str
    """The server, without credentials. An offset means nothing for another one."""

    offset: int = 0
    """Bytes of the spool that the server has confirmed."""

    runs: dict[str, RunId] = field(default_factory=dict)
    """MLflow run ids: `parent`, and each layer's under its number."""

    @classmethod
    def load(cls, path: Path, destination: str, size_bytes: int) -> SendProgress:
        """The stored progress; none if it is another server's, unreadable or past the spool's end."""
        try:
            stored = TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValueError):
            return cls(destination)
        if stored.destination != destination or not 0 <= stored.offset <= size_bytes:
            return cls(destination)
        return stored

    def save(self, path: Path) -> None:
        """Replace the stored progress in one step."""
        write_whole(path, dump_json(asdict(self)))


def _batch(events: Iterator[tuple[Event | Unreadable, int]]) -> list[tuple[Event | Unreadable, int]]:
    """The next events to be confirmed together; a registration is alone, as its server may be another."""
    batch: list[tuple[Event | Unreadable, int]] = []
    for event, end in itertools.islice(events, BATCH_EVENTS):
        if isinstance(event, RegisterEvent) and batch:
            break
        batch.append((event, end))
        if isinstance(event, RegisterEvent):
            break
    return batch


class Delivery:
    """The position in a spool, and what became of the events before it. Has no thread of its own.

    Parameters
    ----------
    spool: what to send.
    progress_path: file that holds the position; replaced after each confirmed batch.
    destination: the server, without credentials.
    redact: removes credentials from an error's text.
    safe_bytes: how much of the spool the next process, perhaps on another machine, will find; no more is sent.

    Attributes
    ----------
    progress: the position, and the ids of the MLflow runs.
    sent, rejected: numbers of events.
    refusals: latest rejected events, as lines `kind: reason`.
    """

    def __init__(
        self,
        spool: Spool,
        progress_path: Path,
        destination: str,
        redact: Callable[[str], str] = str,
        safe_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.sent = self.rejected = 0
        self.refusals: list[str] = []
        self._spool, self._progress_path, self._redact, self._safe_bytes = spool, progress_path, redact, safe_bytes
        self.progress = SendProgress(destination)
        self._doubted: tuple[Event | Unreadable | None, int] = (None, 0)
        self._disk_note: str | None = None

    @property
    def notes(self) -> list[str]:
        """Rejected events, and why the position could not be stored."""
        return [*self.refusals, *([self._disk_note] if self._disk_note else [])]

    def load(self) -> None:
        """Read the persisted position."""
        self.progress = SendProgress.load(self._progress_path, self.progress.destination, self._spool.size_bytes())

    def pending(self) -> int:
        """Number of events that are not confirmed yet."""
        return self._spool.count(self.progress.offset)

    def connect(self, sink: Sink, saving: Callable[[], AbstractContextManager[None]]) -> bool:
        """Introduce the runs to a sink; returns False while there is no event that names them.

        saving: entered while the position changes; it raises where that is no longer allowed.
        """
        first = next(self._safe(0), None)
        if first is None:
            return False
        runs = sink.connect(first[0], self.progress.runs)
        self._save(replace(self.progress, runs=runs), saving)
        return True

    def send_batch(self, sink: Sink, saving: Callable[[], AbstractContextManager[None]]) -> tuple[int, list[str]]:
        """Deliver the next events to a connected sink; returns how many, and those among them that were rejected.

        saving: as for `connect`, which comes first again after RunsLostError.
        """
        batch = _batch(self._safe(self.progress.offset))
        if not batch:
            return 0, []
        rejected: list[str] = []
        try:
            self._deliver(sink, [event for event, _ in batch], rejected)
        except RunsLostError:
            self._save(SendProgress(self.progress.destination), saving)
            raise
        self._save(replace(self.progress, offset=batch[-1][1]), saving)
        # counted with the batch: one that is sent again rejects the same events again
        self.rejected += len(rejected)
        self.refusals = [*self.refusals, *rejected][-KEPT_NOTES:]
        self.sent += len(batch)
        return len(batch), rejected

    def line(self, text: str) -> str:
        """A message fit to be shown, whoever wrote it: a server, or the owner of a run directory."""
        return shortened(self._redact(text.partition("[SQL:")[0]), LONGEST_NOTE)

    def _safe(self, offset: int) -> Iterator[tuple[Event | Unreadable, int]]:
        """Events that the next process will find; any other would be recorded again there, with another time."""
        limit = self._safe_bytes()
        return itertools.takewhile(lambda pair: pair[1] <= limit, self._spool.read(offset))

    def _deliver(self, sink: Sink, events: Sequence[Event | Unreadable], rejected: list[str]) -> None:
        try:
            sink.send(events)
        except RejectedError:
            for event in events:  # one bad event must not take its neighbours with it
                self._deliver_alone(sink, event, rejected)

    def _deliver_alone(self, sink: Sink, event: Event | Unreadable, rejected: list[str]) -> None:
        """Deliver one event, or note that it is rejected; a doubtful refusal counts once it has come often enough."""
        try:
            sink.send([event])
        except RejectedError as error:
            if not error.certain:
                before, times = self._doubted
                self._doubted = event, times + 1 if event == before else 1
                if self._doubted[1] < MOST_DOUBTS:
                    raise
            rejected.append(self.line(f"{event.kind}: {error}"))

    def _save(self, progress: SendProgress, saving: Callable[[], AbstractContextManager[None]]) -> None:
        with saving():
            self.progress = progress
            try:
                progress.save(self._progress_path)
            except OSError as error:
                # a full disk: sending continues, and repeating it after a crash does no harm
                self._disk_note = self.line(f"{self._progress_path.name}: {error}")
