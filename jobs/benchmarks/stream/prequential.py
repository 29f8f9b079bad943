"""The loop of the benchmark: test, then learn, batch by batch; late labels; held-out parts after every segment."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from jobs.benchmarks.stream.rows import Kind, Row
from jobs.benchmarks.stream.streams import Labelling, Part, Stream
from simmatch.labels import UNLABELLED

AT_ONCE = 500
"""Held-out records that are predicted at a time."""


class Result(BaseModel):
    """One row on one stream with one seed."""

    model_config = ConfigDict(extra="forbid")

    stream: str
    row: str
    seed: int
    labels: str
    """Name of the `Labelling`."""

    settings: str
    """The candidate that was chosen before the stream began."""

    accuracy: float
    """Prequential: of the predictions that were made before learning, over all scored records."""

    segments: dict[str, float]
    """The same of each segment."""

    held_out: list[dict[str, float]]
    """After each segment: held-out part → accuracy."""

    labels_used: int
    """Labels that were learnt from, warm-up included."""

    us_per_record: float
    """Processor time of predicting and learning, microseconds per scored record."""

    state_bytes: int
    """Of what has to be kept to go on, at the end."""

    right: list[int]
    """Right predictions of each scored batch."""

    sizes: list[int]
    """Records of each scored batch."""

    segment_ends: list[int]
    """Scored records at the end of each segment."""

    by_final: bool = False
    """Whether rows are compared by `final`: for a stream whose classes come one after the other."""

    @property
    def figure(self) -> float:
        """What rows are compared by."""
        return self.accuracy if self.final is None or not self.by_final else self.final

    @property
    def final(self) -> float | None:
        """Mean accuracy on the held-out parts after the last segment."""
        return sum(self.held_out[-1].values()) / len(self.held_out[-1]) if self.held_out[-1] else None

    @property
    def forgotten(self) -> float | None:
        """Mean of the best accuracy after an earlier segment less that after the last, of held-out parts known by then.

        Source: Chaudhry et al., "Riemannian walk for incremental learning" (2018).
        """
        if len(self.held_out) < 2 or not self.held_out[-1]:
            return None
        best = {name: max(each[name] for each in self.held_out[:-1]) for name in self.held_out[-1]}
        losses = [best[name] - last for name, last in self.held_out[-1].items() if best[name] > 0]
        return sum(losses) / len(losses) if losses else None


@dataclass
class Clock:
    """Processor time of a row."""

    seconds: float = 0.0

    def timed(self, call: Callable[[], object]) -> None:
        """Add the time of a call."""
        begun = time.process_time()
        call()
        self.seconds += time.process_time() - begun


class Late:
    """Records whose labels come late, until they do.

    >>> late = Late(delay=3)
    >>> late.add(torch.arange(2.0).reshape(2, 1, 1, 1), torch.tensor([7, UNLABELLED]), first=0)
    >>> late.due(3), late.due(4)[1]
    (None, tensor([7]))
    """

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self.waiting: deque[tuple[int, Tensor, Tensor]] = deque()

    def add(self, x: Tensor, labels: Tensor, first: int) -> None:
        """Records from number `first` on; those without a label are not kept."""
        for index in (labels != UNLABELLED).nonzero().flatten().tolist():
            self.waiting.append((first + index, x[index], labels[index]))

    def due(self, seen: int) -> tuple[Tensor, Tensor] | None:
        """Records and labels that have come when so many records have arrived."""
        came = []
        while self.waiting and self.waiting[0][0] + self.delay < seen:
            came.append(self.waiting.popleft())
        return (torch.stack([x for _, x, _ in came]), torch.stack([label for *_, label in came])) if came else None


@torch.no_grad()
def run_stream(
    stream: Stream, row: Row, labelling: Labelling, seed: int, step: Callable[[str], object] = lambda part: None
) -> Result:
    """Learn a stream once, in its order.

    Parameters
    ----------
    row: untrained.
    seed: of the labels that are given.
    step: told the name of each part as it begins.
    """
    late, clock, seen, used = Late(labelling.delay), Clock(), 0, 0
    right, sizes, ends = list[int](), list[int](), list[int]()
    segments, held_out, met = dict[str, float](), list[dict[str, float]](), set(stream.warm_up.labels.tolist())
    for number, part in enumerate((stream.warm_up, *stream.segments), start=-1):
        step(part.name)
        clock.seconds = clock.seconds if number > 0 else 0.0  # of the warm-up nothing counts
        first = len(right)
        for x, labels in part.batches(stream.batch_size):
            given = labelling.given(labels, seen, seed)
            seen += len(x)
            if number >= 0:
                right.append(int((_timed_prediction(row, x, clock) == labels).sum()))
                sizes.append(len(x))
            now = given if labelling.delay == 0 else torch.full_like(given, UNLABELLED)
            clock.timed(lambda x=x, now=now: row.learn(x, now))  # type: ignore[misc]
            used += int((now != UNLABELLED).sum())
            if labelling.delay:
                late.add(x, given, seen - len(x))
                if (due := late.due(seen)) is not None:
                    clock.timed(lambda due=due: row.learn_labels(*due))  # type: ignore[misc]
                    used += len(due[1])
        row.end_segment(number)
        if number >= 0:
            ends.append(sum(sizes))
            segments[part.name] = sum(right[first:]) / sum(sizes[first:])
            met |= set(part.labels.tolist())
            held_out.append({each.name: accuracy_of(row, each, met) for each in stream.held_out})
    return Result(
        stream=stream.name, row="", seed=seed, labels=labelling.name, settings="", accuracy=sum(right) / sum(sizes),
        segments=segments, held_out=held_out, labels_used=used, us_per_record=1e6 * clock.seconds / sum(sizes),
        state_bytes=row.nbytes, right=right, sizes=sizes, segment_ends=ends, by_final=stream.by_final,
    )  # fmt: skip


def _timed_prediction(row: Row, x: Tensor, clock: Clock) -> Tensor:
    predicted: list[Tensor] = []
    clock.timed(lambda: predicted.append(row.predict(x)))
    return predicted[0]


def accuracy_of(row: Row, part: Part, met: set[int]) -> float:
    """Accuracy on a held-out part; 0 where none of its classes has been met."""
    if met.isdisjoint(part.labels.tolist()):
        return 0.0
    return sum(int((row.predict(x) == labels).sum()) for x, labels in part.batches(AT_ONCE)) / len(part)


def choose(stream: Stream, kind: Kind, labelling: Labelling, seed: int) -> str:
    """The name of the settings with the best `Result.figure` before the stream begins, where labels are as scarce."""
    if len(kind.candidates) == 1:
        return next(iter(kind.candidates))
    before = stream.before()

    def accuracy(name: str) -> float:
        return run_stream(before, kind.make(before, seed, kind.candidates[name]), labelling, seed).figure

    return max(kind.candidates, key=accuracy)


def measure(
    stream: Stream, name: str, kind: Kind, labelling: Labelling, seed: int, settings: str | None = None
) -> Result:
    """Learn the stream with these settings; None: choose them before it begins."""
    settings = choose(stream, kind, labelling, seed) if settings is None else settings
    result = run_stream(stream, kind.make(stream, seed, kind.candidates[settings]), labelling, seed)
    return result.model_copy(update={"row": name, "settings": settings})
