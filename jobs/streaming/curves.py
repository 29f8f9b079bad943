"""Curves and events of a stream in MLflow, through the run's spool like those of every job.

A row of metrics is recorded at every `EVERY` records, later at every thousandth part of the stream: less than ten
thousand rows for a thousand million records. Values are means since the row before; their step is the number of the
newest record. What the spool holds is not recorded again after a restart.

    accuracy, accuracy_total           prequential, of whoever was the champion
    accuracy/NAME                      of each candidate
    novelty, novelty_threshold, novel  of the champion: mean score, threshold, share of windows above it
    weight                             mean weight with which windows are learnt
    events/KIND                        number so far, by kind: drift, novelty, champion, class, fault
    labels_used, late_labels, faults, classes, journal_bytes
    records_per_second, lag_s, us_per_record/NAME, state_bytes/NAME
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.tracking.events import MetricsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from jobs.streaming.outcome import EventKind, Outcome
from jobs.streaming.totals import Point

UNUSUAL = re.compile(r"[^\w .:/-]")
"""Characters that MLflow takes in no name."""

if TYPE_CHECKING:
    from cluster.tracking.tracker import Tracker

EVERY = 1000
"""Records between two rows of a short stream."""

PART = 1000
"""Of a longer one, a row is recorded for every such part of the records so far."""


FREQUENT: tuple[EventKind, ...] = ("fault", "novelty")
"""Events that may come with every batch: they wait for the next row."""


class Curves:
    """Records what a stream does with a tracker.

    Parameters
    ----------
    tracker: begun.
    run_dir: where its spool is; what that holds of an earlier process is not recorded again.
    """

    def __init__(self, tracker: Tracker, run_dir: Path) -> None:
        self._tracker = tracker
        self._before = Point()
        self._tags: dict[str, str] = {}
        path = run_dir / SPOOL_NAME
        events = Spool(path).read() if path.exists() else ()
        rows = [event.step for event, _ in events if isinstance(event, MetricsEvent)]
        self._recorded = max(rows, default=0)
        self._next = _next(self._recorded)

    def add(self, outcome: Outcome, latest: Point, counts: dict[str, int]) -> None:
        """A batch, the sums after it, and the number of events so far by kind."""
        number = latest.number
        if number <= self._recorded:
            self._before = latest
            return
        for event in outcome.events:
            self._tags[f"simmatch.stream.{event.kind}"] = f"record {event.number:,}: {event.text}"
        if number >= self._next or any(event.kind not in FREQUENT for event in outcome.events):
            self.record(latest, counts)

    def record(self, latest: Point, counts: dict[str, int]) -> None:
        """A row now, unless this record has one."""
        number = latest.number
        if self._tags:
            self._tracker.tags(self._tags)
            self._tags = {}
        if number > self._recorded:
            self._tracker.metrics(number, row(self._before, latest) | _counts(counts))
            self._before, self._recorded, self._next = latest, number, _next(number)


def _next(number: int) -> int:
    return number + max(EVERY, number // PART)


def _counts(counts: dict[str, int]) -> dict[str, float]:
    return {f"events/{kind}": float(number) for kind, number in counts.items()}


def row(before: Point, latest: Point) -> dict[str, float]:
    """Metrics since an earlier point."""
    records, seconds = latest.records - before.records, latest.elapsed_s - before.elapsed_s
    champion = latest.of(latest.champion)
    champion_before = before.of(latest.champion)
    windows = latest.windows - before.windows
    measured = champion.measured - champion_before.measured
    values = {
        "accuracy": _ratio(latest.right - before.right, latest.answered - before.answered),
        "accuracy_total": _ratio(latest.right, latest.answered),
        "novelty": _ratio(champion.novelty - champion_before.novelty, measured),
        "novelty_threshold": champion.threshold,
        "novel": _ratio(champion.novel - champion_before.novel, windows),
        "weight": _ratio(champion.weight - champion_before.weight, measured),
        "labels_used": float(latest.labels),
        "late_labels": float(latest.late),
        "faults": float(latest.faults),
        "classes": float(latest.classes),
        "journal_bytes": float(latest.journal_bytes),
        "records_per_second": _ratio(records, seconds),
        "lag_s": latest.lag_s,
    }
    for name, candidate in latest.candidates.items():
        earlier = before.of(name)
        values[f"accuracy/{name}"] = _ratio(candidate.right - earlier.right, candidate.answered - earlier.answered)
        values[f"us_per_record/{name}"] = _ratio(1e6 * (candidate.seconds - earlier.seconds), records)
        values[f"state_bytes/{name}"] = float(candidate.state_bytes)
    return {UNUSUAL.sub("_", name): value for name, value in values.items() if value is not None}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
