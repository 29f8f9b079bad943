"""What a stream's page and report show: a bounded history of outcomes, RUN_DIR/seen.json.

Counts are kept as totals since the stream began, so a point may be left out without changing the others. There are at
most `2 · KEPT` points, at equal numbers of batches: once there are more, every second one is dropped and the step
between points doubles. A year of records takes no more room than an hour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cluster.storage import read_as
from jobs.streaming.outcome import CandidateMetrics, Event, Outcome, Usage, finite
from simmatch.config import Frozen, NonNegativeInt
from simmatch.documents import shortened
from simmatch.files import write_whole

FILE = "seen.json"
FORMAT = 1
KEPT = 300
"""Least number of points of a long stream."""

EVENTS = 200
"""Latest events that are kept; of the others, how many there were."""

SWITCHES = 200
LONGEST = 300
"""Characters of an event's text."""


@dataclass(frozen=True)
class Spent:
    """What has passed since the batch before: seconds, seconds of processor of the whole process, duplicates."""

    elapsed_s: float = 0.0
    process_s: float = 0.0
    duplicates: int = 0


class Candidate(Frozen):
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
    ) -> Candidate:
        """With one more batch; what it tells nothing about stays."""
        novelty = finite(batch.novelty)
        difference = batch.difference or (self.difference if same_champion else None)
        return Candidate(
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
    candidates: dict[str, Candidate] = Field(default_factory=dict)

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
            lag_s=_greatest(self.lag_s, usage.lag_s),
            journal_bytes=usage.journal_bytes,
            champion=metrics.champion,
            candidates={
                name: self.candidates.get(name, Candidate()).after(
                    each,
                    windows=metrics.windows,
                    drifts=drifts[name],
                    seconds=usage.seconds.get(name, 0.0),
                    same_champion=metrics.champion == self.champion,
                )
                for name, each in metrics.candidates.items()
            },
        )


class Noted(Frozen):
    """An event, as the page shows it."""

    index: int
    kind: str
    number: int
    time: float
    text: str
    candidate: str = ""


class Switch(Frozen):
    """From record `number` on `champion` answers."""

    number: int
    champion: str


class Kept(Frozen):
    """What the file holds. `step`: batches between two points; `latest`: after the newest batch."""

    format: int = FORMAT
    name: str = ""
    state: str = ""
    written: float = 0.0
    """Unix time."""
    step: NonNegativeInt = 1
    points: list[Point] = Field(default_factory=list)
    latest: Point | None = None
    events: list[Noted] = Field(default_factory=list)
    counts: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Of events, by kind."""
    switches: list[Switch] = Field(default_factory=list)


class History:
    """Takes in outcomes; those that come again after a restart are known by the number of their batch.

    name: of the stream.
    """

    def __init__(self, name: str = "") -> None:
        self.kept = Kept(name=name)

    def load(self, run_dir: Path) -> None:
        """Continue what the file holds; one that is missing, or is not ours, is left out."""
        kept = load(run_dir)
        if kept is not None:
            self.kept = kept.model_copy(update={"name": self.kept.name})

    @property
    def batch(self) -> int:
        """The newest batch; 0 if there is none."""
        return self.kept.latest.batch if self.kept.latest is not None else 0

    def add(self, outcome: Outcome, usage: Usage, spent: Spent) -> bool:
        """Take in a batch; False where it is known already."""
        if outcome.metrics.batch <= self.batch:
            return False
        kept = self.kept
        before = kept.latest or Point()
        latest = before.after(outcome, usage, spent)
        switches = kept.switches
        if latest.champion != before.champion:
            switches = [*switches, Switch(number=latest.number, champion=latest.champion)][-SWITCHES:]
        points, step = kept.points, kept.step
        if latest.batch % step == 0:
            points = [*points, latest]
            latest = latest.model_copy(update={"lag_s": None})
            while len(points) > 2 * KEPT:
                step *= 2
                points = _thinned(points, step)
        self.kept = kept.model_copy(
            update={
                "points": points,
                "step": step,
                "latest": latest,
                "switches": switches,
                "events": [*kept.events, *map(_noted, outcome.events)][-EVENTS:],
                "counts": _counted(kept.counts, outcome.events),
            }
        )
        return True

    def write(self, run_dir: Path, state: str, now: float) -> None:
        """Write the file.

        Raises
        ------
        OSError
            The disk did not take it; the older file is unchanged.
        """
        self.kept = self.kept.model_copy(update={"state": state, "written": now})
        write_whole(run_dir / FILE, self.kept.model_dump_json())


def load(run_dir: Path) -> Kept | None:
    """What the file of a run directory holds; None if there is none, or it is not ours."""
    try:
        kept = read_as(Kept, run_dir / FILE)
    except OSError:
        return None
    return kept if kept is not None and kept.format == FORMAT else None


def points_of(kept: Kept) -> list[Point]:
    """All points, with the newest batch as the last one."""
    points = list(kept.points)
    if kept.latest is not None and (not points or points[-1].batch < kept.latest.batch):
        points.append(kept.latest)
    return points


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


def _thinned(points: list[Point], step: int) -> list[Point]:
    """Those at multiples of `step` batches; a greatest value is that of all since the point before."""
    kept: list[Point] = []
    greatest: float | None = None
    for point in points:
        greatest = _greatest(greatest, point.lag_s)
        if point.batch % step == 0:
            kept.append(point.model_copy(update={"lag_s": greatest}))
            greatest = None
    return kept


def _noted(event: Event) -> Noted:
    return Noted(
        index=event.index,
        kind=event.kind,
        number=event.number,
        time=finite(event.time) or 0.0,
        text=shortened(event.text, LONGEST),
        candidate=shortened(str(event.fields.get("candidate", "")), LONGEST),
    )


def _counted(counts: Mapping[str, int], events: Iterable[Event]) -> dict[str, int]:
    counted = dict(counts)
    for event in events:
        counted[event.kind] = counted.get(event.kind, 0) + 1
    return counted


def _greatest(first: float | None, second: float | None) -> float | None:
    known = [value for value in map(finite, (first, second)) if value is not None]
    return max(known) if known else None
