"""What a stream's page and report show: a bounded history of outcomes, RUN_DIR/seen.json.

Points are totals since the stream began, so one may be left out without changing the others. There are at most
`2 · KEPT` points, at equal numbers of batches: once there are more, every second one is dropped and the step between
points doubles. A year of records takes no more room than an hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from cluster.storage import read_as
from jobs.streaming.outcome import Event, Outcome, Usage, finite
from jobs.streaming.totals import Point, Spent, greatest_of
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


def _thinned(points: list[Point], step: int) -> list[Point]:
    """Those at multiples of `step` batches; a greatest value is that of all since the point before."""
    kept: list[Point] = []
    greatest: float | None = None
    for point in points:
        greatest = greatest_of(greatest, point.lag_s)
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
