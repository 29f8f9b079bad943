"""What a source of a stream delivers: records, late labels, and what could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Position = Mapping[str, Any]
"""Where reading goes on behind a delivery, in JSON's types. Its `source` is a key: of several positions of one key the
last one counts."""


@dataclass(frozen=True, eq=False)
class Record:
    """One record.

    Attributes
    ----------
    id: names it among all records of the stream.
    time: of its first sample, in seconds. Further samples follow at the period of the configuration.
    values: float64 [T, C], T samples of C channels, NaN where one is missing; or an image, uint8 [C, H, W].
    label: the name of its class; None: it has none, or none yet.
    group: the machine, or group of channels, that it comes from. Samples of one group follow each other.
    begins: no window contains samples of this record and of those before it: a recording begins with it.

    >>> Record("pump/7", time=3.5, values=np.zeros((1, 2)), group="pump").label is None
    True
    """

    id: str
    time: float
    values: np.ndarray[Any, np.dtype[Any]]
    label: str | None = None
    group: str = ""
    begins: bool = False


@dataclass(frozen=True)
class LateLabel:
    """The label of a record that came before.

    >>> LateLabel("pump/7", "worn")
    LateLabel(id='pump/7', label='worn')
    """

    id: str
    label: str


@dataclass(frozen=True)
class Fault:
    """Something that is no record, and is set aside.

    Attributes
    ----------
    reason: what was expected and what was found, in one printable line.
    raw: what was found, the beginning of it where it is too long.
    place: where: file and line, or topic.

    >>> Fault("expected JSON, got nothing", b"", "log.jsonl, line 3").place
    'log.jsonl, line 3'
    """

    reason: str
    raw: bytes | str
    place: str


@dataclass(frozen=True, eq=False)
class Delivery:
    """What a source hands over, until it is acknowledged.

    Attributes
    ----------
    item: what came.
    position: to be given to `open_source` at the next start; None: the source itself knows what was acknowledged.
    receipt: the source's own, for `acknowledge`.
    """

    item: Record | LateLabel | Fault
    position: Position | None = None
    receipt: Any = None


class Source(Protocol):
    """Where records come from. One thread uses it.

    Whatever was delivered and not acknowledged is delivered again after a restart, with the positions of what was.
    """

    @property
    def ended(self) -> bool:
        """A source that is not followed has delivered all."""

    def poll(self, limit: int, wait_s: float) -> list[Delivery]:
        """At most `limit` deliveries, in order. It returns with what there is, and waits at most about `wait_s` for the
        first one.

        Raises
        ------
        SourceError
            The source can never be read again, whatever is waited for.
        """

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """These are safe: they need never be delivered again. In the order of their delivery."""

    def needs(self, key: str) -> bool:
        """Whether the position of a key still says something: not that of a file which is gone."""

    def close(self) -> None:
        """Let go of files and connections. What is not acknowledged stays so."""


class SourceError(RuntimeError):
    """A source cannot be used. The one-line message names it, what was expected and what was found.

    >>> raise SourceError("log.csv: expected a file, got a folder")
    Traceback (most recent call last):
    jobs.streaming.records.SourceError: log.csv: expected a file, got a folder
    """
