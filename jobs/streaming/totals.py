"""Sums of a stream since it began, after a batch: differences of two of them tell of the batches in between."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from jobs.streaming.outcome import CandidateMetrics, Outcome, Usage, finite
from simmatch.config import Frozen


@dataclass(frozen=True)
class Spent:
    """What has passed since the batch before: seconds, seconds of processor of the whole process, duplicates."""

    elapsed_s: float = 0.0
    process_s: float = 0.0
    duplicates: int = 0


class CandidateTotals(Frozen):
    """Sums of one candidate since the stream began; `threshold`, `difference` and `state_bytes` are the latest values.

    Attributes
    ----------
    novelty, measured: sum of the novelty scores, and of how many windows.
    seconds: of processor.
    difference: lower end, mean and upper end of this accuracy less the champion's, an anytime-valid interval.
    """

    answered: int = 0
    right: int = 0
    novel: int = 0
    drifts: int = 0
    novelty: float = 0.0
    measured: int = 0
    weight: float = 0.0
    threshold: float | None = None
    seconds: float = 0.0
    state_bytes: int = 0
    difference: Annotated[tuple[float, float, float], Field(strict=False)] | None = None

    def after(
        self, batch: CandidateMetrics, *, windows: int, drifts: int, seconds: float, same_champion: bool
    ) -> CandidateTotals:
        """With one more batch; what it tells nothing about stays."""
        novelty = finite(batch.novelty)
        difference = batch.difference or (self.difference if same_champion else None)
        return CandidateTotals(
            answered=self.answered + batch.answered,
            right=self.right + batch.right,
            novel=self.novel + batch.novel,
            drifts=self.drifts + drifts,
            novelty=self.novelty + (0.0 if novelty is None else windows * novelty),
            measured=self.measured + (0 if novelty is None else windows),
            weight=self.weight + (0.0 if novelty is None else windows * (finite(batch.weight) or 0.0)),
            threshold=self.threshold if batch.threshold is None else finite(batch.threshold),
            seconds=self.seconds + max(0.0, seconds),
            state_bytes=batch.nbytes or self.state_bytes,
            difference=difference if difference and all(map(math.isfinite, difference)) else None,
        )


class Point(Frozen):
    """Sums since the stream began, after a batch. `lag_s` is the greatest since the point before; `number`, `time`,
    `classes`, `journal_bytes` and `champion` are the latest values.

    Attributes
    ----------
    answered, right: of the answers of whoever was the champion.
    elapsed_s: in which the job was at work or waited for records.
    process_s: seconds of processor of the whole process.
    """

    batch: int = 0
    number: int = 0
    time: float = 0.0
    records: int = 0
    windows: int = 0
    labels: int = 0
    late: int = 0
    unused: int = 0
    came: int = 0
    faults: int = 0
    duplicates: int = 0
    classes: int = 0
    answered: int = 0
    right: int = 0
    elapsed_s: float = 0.0
    process_s: float = 0.0
    lag_s: float | None = None
    journal_bytes: int = 0
    champion: str = ""
    candidates: dict[str, CandidateTotals] = Field(default_factory=dict)

    def after(self, outcome: Outcome, usage: Usage, spent: Spent) -> Point:
        """With one more batch."""
        metrics = outcome.metrics
        answers = metrics.candidates.get(self.champion or metrics.champion, CandidateMetrics())
        drifts = Counter(str(event.fields.get("candidate")) for event in outcome.events if event.kind == "drift")
        return Point(
            batch=metrics.batch,
            number=metrics.number,
            time=finite(metrics.time) or 0.0,
            records=self.records + metrics.records,
            windows=self.windows + metrics.windows,
            labels=self.labels + metrics.labels,
            late=self.late + metrics.late,
            unused=self.unused + metrics.unused,
            came=self.came + metrics.came,
            faults=self.faults + metrics.faults,
            duplicates=self.duplicates + max(0, spent.duplicates),
            classes=metrics.classes,
            answered=self.answered + answers.answered,
            right=self.right + answers.right,
            elapsed_s=self.elapsed_s + max(0.0, spent.elapsed_s),
            process_s=self.process_s + max(0.0, spent.process_s),
            lag_s=greatest_of(self.lag_s, usage.lag_s),
            journal_bytes=usage.journal_bytes,
            champion=metrics.champion,
            candidates={
                name: self.of(name).after(
                    each,
                    windows=metrics.windows,
                    drifts=drifts[name],
                    seconds=usage.seconds.get(name, 0.0),
                    same_champion=metrics.champion == self.champion,
                )
                for name, each in metrics.candidates.items()
            },
        )

    def of(self, name: str) -> CandidateTotals:
        """Those of a candidate; zeros before it was there."""
        return self.candidates.get(name, CandidateTotals())


def windowed(totals: Sequence[tuple[float, float]], least: float) -> list[float | None]:
    """Ratio of the increases of two totals over the latest points with an increase of the second by at least `least`,
    or over all of them where it has not increased so far yet.

    totals: (numerator, denominator) at every point, since the beginning. None while the denominator is 0.

    >>> windowed([(0, 0), (1, 2), (2, 4), (2, 6), (4, 8)], least=4)
    [None, 0.5, 0.5, 0.25, 0.5]
    """
    ratios: list[float | None] = []
    known = [(0.0, 0.0), *totals]
    first = 0
    for above, below in totals:
        while first + 1 < len(known) and below - known[first + 1][1] >= least:
            first += 1
        part = below - known[first][1]
        ratios.append((above - known[first][0]) / part if part > 0 else None)
    return ratios


def accuracies(points: Sequence[Point], name: str, least: float) -> list[float | None]:
    """Accuracy of a candidate over its latest answers, at least so many, at every point."""
    return windowed([(each.right, each.answered) for each in (point.of(name) for point in points)], least)


def novelties(points: Sequence[Point], name: str) -> list[float | None]:
    """Mean novelty score of a candidate since the point before, at every point."""
    return windowed([(each.novelty, each.measured) for each in (point.of(name) for point in points)], least=1)


def greatest_of(first: float | None, second: float | None) -> float | None:
    """The greater of what is known."""
    known = [value for value in map(finite, (first, second)) if value is not None]
    return max(known) if known else None
