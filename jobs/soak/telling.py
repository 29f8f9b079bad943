"""What is told of strikes: a timeline for every run, a table for all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jobs.reporting import Report
from jobs.soak.strikes import Strike

MARKS = "xov^sD"


def timeline(report: Report, name: str, trace: Sequence[tuple[float, int]], strikes: Sequence[Strike]) -> None:
    """Updates done over the seconds of one run, and what struck it where: `figures/<name>.png`."""
    start = trace[0][0] if trace else 0.0
    with report.figure(name) as figure:
        axes = figure.subplots()
        axes.plot([at - start for at, _ in trace], [step for _, step in trace], color="black", lw=1)
        for number, kind in enumerate(sorted({strike.kind for strike in strikes})):
            these = [strike for strike in strikes if strike.kind == kind]
            places = [each.time - start for each in these], [each.step for each in these]
            axes.plot(*places, MARKS[number % len(MARKS)], label=kind, ms=7)
        axes.set(xlabel="seconds", ylabel="updates done", title=f"{name}: {len(strikes)} strikes")
        if strikes:
            axes.legend()


def summary(report: Report, title: str, strikes: Sequence[Strike]) -> None:
    """Strikes by kind and all together: how many were survived, seconds to work again, updates done again."""
    rows = []
    for kind in [*sorted({strike.kind for strike in strikes}), "all"]:
        these = [strike for strike in strikes if kind in ("all", strike.kind)]
        seconds = [strike.recovered_s for strike in these if strike.recovered_s is not None]
        again = [strike.again for strike in these if strike.again is not None]
        found = {
            "strikes": len(these),
            "survived": sum(strike.survived for strike in these),
            "median_s": statistics.median(seconds) if seconds else None,
            "worst_s": max(seconds, default=None),
            "median_again": statistics.median(again) if again else None,
            "worst_again": max(again, default=None),
        }
        report.row(kind="summary", struck_by=kind, **found)
        rows.append([kind, *found.values()])
    columns = ("struck by", "strikes", "survived", "median, s", "worst, s", "updates again, median", "worst")
    report.table(title, columns, rows)
