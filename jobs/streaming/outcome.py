"""What the pipeline returns for a batch: answers, events, metrics, and records that were set aside.

All of it follows from the journal: applied again, the same journal gives equal outcomes. Fields that are measured, such
as seconds, take no part in comparisons. After a restart the batches since the newest snapshot are applied again, so an
outcome may come twice; it is known by its batch number, and answers and events by the number of their record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue
from torch import Tensor

EventKind = Literal["calibrated", "class", "drift", "novelty", "set_aside", "switch"]


@dataclass(frozen=True)
class Answer:
    """What the champion says about one window, before anything has been learnt from it.

    Attributes
    ----------
    id: of the record that holds the window's last sample; an image, or a record of one window, is that record.
    number: of this record, counted from 0 in the order of the journal.
    time: of this record.
    window: number of the window, counted from 0.
    group: the machine or channel group.
    label: name of the class with the largest score; None without scores.
    classes: names of the classes, in the order of `scores`.
    scores: [classes]; None before the stack is calibrated and two classes are known.
    features: [F], what the readout sees; None before the stack is calibrated.
    novelty: score of the novelty detector; None before there is one.
    novel: whether the score exceeds the threshold; None before there is one.
    configuration: name of the candidate that answers.
    note: why there are no scores, else empty.
    """

    id: str
    number: int
    time: float
    window: int
    group: str
    label: str | None
    classes: tuple[str, ...]
    scores: Tensor | None = field(compare=False)
    features: Tensor | None = field(compare=False)
    novelty: float | None
    novel: bool | None
    configuration: str
    note: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened in the stream.

    Attributes
    ----------
    kind: `calibrated`: a candidate's first layer is calibrated; `class`: a new class appeared; `drift`: of a signal;
        `novelty`: records of a batch are far outside; `set_aside`: records of a batch were set aside; `switch`: another
        candidate answers.
    number, time: of the record at which it was noticed.
    text: one line for a person.
    fields: the same for a program.
    configuration: name of the candidate; empty where it concerns all.
    """

    kind: EventKind
    number: int
    time: float
    text: str
    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    configuration: str = ""


@dataclass(frozen=True)
class SetAside:
    """A record that nothing was learnt from.

    Attributes
    ----------
    entry: number of its entry in the journal.
    id: of the record; empty where it could not be read.
    reason: what is wrong with it, one line.
    raw: what arrived, the start of it.
    place: where it came from: a file and line, or a topic.
    """

    entry: int
    id: str
    reason: str
    raw: str
    place: str


@dataclass(frozen=True)
class Standing:
    """How one candidate does. Names with `all_` count since the beginning of the stream, the others this batch.

    Attributes
    ----------
    scored, right: answers whose label is known, at once or by now, and those of them that were right (prequential: the
        answers given before anything was learnt from the window).
    all_scored, all_right: the same.
    label_scored, label_right: the same for V, where the last layer is supervised.
    novelty: mean score of the windows; None before there is a detector.
    threshold: of the detector; None before it is calibrated.
    novel, all_novel: windows above the threshold.
    signals: means of the label-free signals.
    all_drifts: drifts found.
    state_bytes: size of everything the candidate would need to go on.
    seconds: of this process for this batch: measured, no part of comparisons.
    """

    scored: int = 0
    right: int = 0
    all_scored: int = 0
    all_right: int = 0
    label_scored: int = 0
    label_right: int = 0
    novelty: float | None = None
    threshold: float | None = None
    novel: int = 0
    all_novel: int = 0
    signals: Mapping[str, float] = field(default_factory=dict)
    all_drifts: int = 0
    state_bytes: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Metrics:
    """Counts since the beginning of the stream, and how the candidates do.

    Attributes
    ----------
    batch: number of the batch, counted from 1.
    number, time: of the newest record.
    records: that are in the journal.
    windows: that were cut from them.
    labels: windows that were learnt from with a label, at once or late.
    late_labels: of these, labels that came after their records.
    unused_labels: late labels of unknown or forgotten records, or of records in which no window ends.
    set_aside: records, labels and faults of the source that nothing was learnt from.
    champion: who answers.
    standings: by candidate.
    """

    batch: int
    number: int
    time: float
    records: int
    windows: int
    labels: int
    late_labels: int
    unused_labels: int
    set_aside: int
    champion: str
    standings: Mapping[str, Standing]


@dataclass(frozen=True)
class Outcome:
    """All that a batch led to."""

    batch: int
    answers: tuple[Answer, ...]
    events: tuple[Event, ...]
    set_aside: tuple[SetAside, ...]
    metrics: Metrics
