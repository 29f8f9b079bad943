"""What the pipeline returns for a batch: answers, events, metrics, and records that were set aside.

All of it follows from the journal: applied again, the same journal gives equal outcomes. After a restart the batches
since the newest snapshot are applied again, so an outcome may come twice; metrics are known by the number of their
batch, events by their index, answers by the number of their window. `Usage` is measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue
from torch import Tensor

JsonFields = Mapping[str, JsonValue]
EventKind = Literal["calibrated", "class", "drift", "fault", "novelty", "champion"]


@dataclass(frozen=True)
class Answer:
    """What the champion says about one window, before anything has been learnt from it.

    Attributes
    ----------
    id: of the record that holds the window's last sample; an image, or a record that is a window, is that record.
    number: of this record, counted from 1 over the whole stream, in the order of the journal.
    time: of this record.
    window: number of the window, counted from 1.
    group: the machine or channel group.
    candidate: who answers.
    version: the number of batches that it had learnt from.
    label: name of the class with the largest score; None without scores.
    scores: by class; empty before the stack is calibrated and two classes are known.
    novelty: None before the stack is calibrated.
    novel: whether the novelty is above the threshold; False while there is none.
    features: [F], what the readout sees; None before the stack is calibrated.
    note: why there are no scores, else empty.
    """

    id: str
    number: int
    time: float
    window: int
    group: str
    candidate: str
    version: int
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    novelty: float | None = None
    novel: bool = False
    features: Tensor | None = field(default=None, compare=False)
    note: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened in the stream.

    Attributes
    ----------
    index: counted from 0 over the whole stream: receivers drop repeats by it.
    kind: `calibrated`: the first windows have calibrated the stacks; `class`: a new class appeared; `drift`: of a
        signal of a candidate; `novelty`: records of a batch are far outside; `fault`: a record was set aside;
        `champion`: another candidate answers from the next batch on.
    number, time: of the record at which it was noticed.
    text: one line for a person.
    fields: the same for a program. drift: candidate, signal, before, after. novelty: candidate, windows, of, largest,
        threshold, id. champion: before, after, low, high. class: label. fault: id, reason, place, total.
        calibrated: windows.
    """

    index: int
    kind: EventKind
    number: int
    time: float
    text: str
    fields: JsonFields = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateMetrics:
    """How one candidate did in one batch.

    Attributes
    ----------
    answered, right: predictions whose label became known in this batch, at once or late, and those of them that were
        right. A prediction is the answer that was given before anything was learnt from the window.
    label_answered, label_right: the same for V, where the last layer is supervised.
    novelty: mean over the windows; None before calibration, or without windows.
    threshold: of the novelty; None before there is one.
    novel: windows above it.
    weight: mean weight that windows learn with; 1 where none is far outside.
    signals: means of the label-free signals: objective, residual, active, ….
    rate: learning rate of the first layer now.
    difference: lower end, mean and upper end of the confidence sequence of this accuracy − the champion's; None for the
        champion, and before there is one.
    nbytes: size of everything it has to remember.
    """

    answered: int = 0
    right: int = 0
    label_answered: int = 0
    label_right: int = 0
    novelty: float | None = None
    threshold: float | None = None
    novel: int = 0
    weight: float = 1.0
    signals: Mapping[str, float] = field(default_factory=dict)
    rate: float = 0.0
    difference: tuple[float, float, float] | None = None
    nbytes: int = 0


@dataclass(frozen=True)
class Metrics:
    """What one batch held, and how the candidates did; sums over batches are sums over the stream.

    Attributes
    ----------
    batch: its number, counted from 1.
    number, time: of the newest record of the stream.
    records, windows: in this batch.
    labels: windows learnt from with a label in this batch, at once or late; `late` of them late.
    unused: late labels of unknown or forgotten records, or of records in which no window ends.
    came: labels that came, with a record or by its id; one that is used may be that of several windows, or of none.
    faults: records, labels and faults of the source that were set aside.
    classes: known by now.
    champion: who answers from the next batch on.
    """

    batch: int
    number: int
    time: float
    records: int
    windows: int
    labels: int
    late: int
    unused: int
    faults: int
    classes: int
    champion: str
    candidates: Mapping[str, CandidateMetrics]
    came: int = 0


@dataclass(frozen=True)
class SetAside:
    """Something that arrived and that nothing was learnt from.

    Attributes
    ----------
    entry: number of its entry in the journal.
    id: of the record or label; empty where it could not be read.
    reason: what is wrong, one line.
    raw: what arrived, the start of it.
    place: where it came from: a file and line, or a topic.
    """

    entry: int
    id: str
    reason: str
    raw: str
    place: str


@dataclass(frozen=True)
class Outcome:
    """All that a batch led to."""

    answers: tuple[Answer, ...]
    events: tuple[Event, ...]
    set_aside: tuple[SetAside, ...]
    metrics: Metrics


@dataclass(frozen=True)
class Usage:
    """What is measured beside a batch, and differs from run to run.

    Attributes
    ----------
    seconds: of processor time of this thread and of ranks, by candidate.
    wall_s: from the end of the batch to its outcome.
    lag_s: from the arrival of the batch's first record to the outcome; None for a batch that is applied again.
    journal_bytes: on the disk.
    duplicates: records and labels that came again, since this process began.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    lag_s: float | None = None
    journal_bytes: int = 0
    duplicates: int = 0


def finite(value: float | None) -> float | None:
    """A number as JSON holds it: None where it is not finite.

    >>> finite(0.5), finite(math.inf)
    (0.5, None)
    """
    return value if value is not None and math.isfinite(value) else None
