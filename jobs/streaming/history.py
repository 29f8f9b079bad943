"""What a stream's page and report show: a bounded history of outcomes, RUN_DIR/seen.json.

Counts are kept as totals since the stream began, so a point may be left out without changing the others. There are at
most `2 · KEPT` points, at equal numbers of batches: once there are more, every second one is dropped and the step
between points doubles. A year of records takes no more room than an hour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import read_as
from jobs.streaming.outcome import Event, Metrics, Outcome, Standing
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
class Usage:
    """What is measured beside a batch, which does not follow from the journal.

    Attributes
    ----------
    wall_s: seconds since the batch before it.
    process_s: seconds of processor, of the whole process, in that time.
    lag_s: the present less the time of the newest record; None where times of records are not those of a clock.
    journal_bytes: size of the journal.
    """

    wall_s: float
    process_s: float
    lag_s: float | None
    journal_bytes: int


class Candidate(Frozen):
    """Totals of one candidate; `threshold`, `weight`, `difference` and `state_bytes` are the latest values.

    Attributes
    ----------
    novelty, measured: sum of the novelty scores, and of how many windows.
    seconds: of processor.
    difference: least, mean and greatest accuracy of this candidate less the champion's, an anytime-valid interval.
    """

    scored: int = 0
    right: int = 0
    novel: int = 0
    drifts: int = 0
    novelty: float = 0.0
    measured: int = 0
    threshold: float | None = None
    seconds: float = 0.0
    state_bytes: int = 0
    difference: tuple[float, float, float] | None = None

    def after(self, standing: Standing, windows: int) -> Candidate:
        """With a batch of so many windows."""
        known = standing.novelty is not None and math.isfinite(standing.novelty)
        difference = getattr(standing, "difference", None)
        return Candidate(
            scored=standing.all_scored,
            right=standing.all_right,
            novel=standing.all_novel,
            drifts=standing.all_drifts,
            novelty=self.novelty + (windows * float(standing.novelty or 0.0) if known else 0.0),
            measured=self.measured + (windows if known else 0),
            threshold=_finite(standing.threshold),
            seconds=self.seconds + max(0.0, standing.seconds),
            state_bytes=standing.state_bytes,
            difference=None if difference is None or not all(map(math.isfinite, difference)) else tuple(difference),
        )


class Point(Frozen):
    """Totals after a batch; `lag_s` is the greatest since the point before, `time` and `champion` are the latest.

    Attributes
    ----------
    scored, right: of the answers of whoever was the champion.
    """

    batch: int
    number: int
    time: float
    records: int = 0
    windows: int = 0
    labels: int = 0
    late_labels: int = 0
    unused_labels: int = 0
    set_aside: int = 0
    duplicates: int = 0
    scored: int = 0
    right: int = 0
    wall_s: float = 0.0
    process_s: float = 0.0
    lag_s: float | None = None
    journal_bytes: int = 0
    champion: str = ""
    candidates: dict[str, Candidate] = {}

    def after(self, metrics: Metrics, usage: Usage) -> Point:
        """With one more batch."""
        windows = metrics.windows - self.windows
        standing = metrics.standings.get(metrics.champion, Standing())
        nothing = Candidate()
        return Point(
            batch=metrics.batch,
            number=metrics.number,
            time=_finite(metrics.time) or 0.0,
            records=metrics.records,
            windows=metrics.windows,
            labels=metrics.labels,
            late_labels=metrics.late_labels,
            unused_labels=metrics.unused_labels,
            set_aside=metrics.set_aside,
            duplicates=getattr(metrics, "duplicates", 0),
            scored=self.scored + standing.scored,
            right=self.right + standing.right,
            wall_s=self.wall_s + max(0.0, usage.wall_s),
            process_s=self.process_s + max(0.0, usage.process_s),
            lag_s=_greatest(self.lag_s, usage.lag_s),
            journal_bytes=usage.journal_bytes,
            champion=metrics.champion,
            candidates={
                name: self.candidates.get(name, nothing).after(each, windows)
                for name, each in metrics.standings.items()
            },
        )


class Noted(Frozen):
    """An event, as the page shows it."""

    batch: int
    kind: str
    number: int
    time: float
    text: str
    configuration: str = ""


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
    points: list[Point] = []
    latest: Point | None = None
    events: list[Noted] = []
    counts: dict[str, NonNegativeInt] = {}
    """Of events, by kind."""
    switches: list[Switch] = []


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

    def add(self, outcome: Outcome, usage: Usage) -> bool:
        """Take in a batch; False where it is known already."""
        if outcome.metrics.batch <= self.batch:
            return False
        kept = self.kept
        before = kept.latest or Point(batch=0, number=-1, time=0.0)
        latest = before.after(outcome.metrics, usage)
        switches = kept.switches
        if latest.champion != before.champion:
            switches = [*switches, Switch(number=latest.number, champion=latest.champion)][-SWITCHES:]
        points, step = kept.points, kept.step
        if latest.batch - (points[-1].batch if points else 0) >= step:
            points.append(latest)
            latest = latest.model_copy(update={"lag_s": None})
            if len(points) > 2 * KEPT:
                points, step = _thinned(points), 2 * step
        self.kept = kept.model_copy(
            update={
                "points": points,
                "step": step,
                "latest": latest,
                "switches": switches,
                "events": [*kept.events, *(_noted(outcome.batch, event) for event in outcome.events)][-EVENTS:],
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
    """Ratio of the increases of two totals over the latest points with an increase of the second by at least `least`.

    totals: (numerator, denominator) at every point, since the beginning. None before the denominator has grown so far.

    >>> windowed([(1, 2), (2, 4), (2, 6), (4, 8)], least=4)
    [None, 0.5, 0.25, 0.5]
    """
    ratios: list[float | None] = []
    known = [(0.0, 0.0), *totals]
    first = 0
    for above, below in totals:
        while first + 1 < len(known) and below - known[first + 1][1] >= least:
            first += 1
        part = below - known[first][1]
        ratios.append((above - known[first][0]) / part if part >= max(least, 1) else None)
    return ratios


def _thinned(points: list[Point]) -> list[Point]:
    """Every second point; a greatest value is that of both."""
    pairs = zip(points[::2], points[1::2], strict=False)
    return [
        second.model_copy(update={"lag_s": _greatest(first.lag_s, second.lag_s)}) for first, second in pairs
    ] + points[2 * (len(points) // 2) :]


def _noted(batch: int, event: Event) -> Noted:
    return Noted(
        batch=batch,
        kind=event.kind,
        number=event.number,
        time=_finite(event.time) or 0.0,
        text=shortened(event.text, LONGEST),
        configuration=event.configuration,
    )


def _counted(counts: Mapping[str, int], events: Iterable[Event]) -> dict[str, int]:
    counted = dict(counts)
    for event in events:
        counted[event.kind] = counted.get(event.kind, 0) + 1
    return counted


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _greatest(first: float | None, second: float | None) -> float | None:
    known = [value for value in (first, second) if value is not None and math.isfinite(value)]
    return max(known) if known else None
