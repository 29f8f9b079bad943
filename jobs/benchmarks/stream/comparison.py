"""Champion and challengers on simulated streams: records until a better one is found, and switches that are false.

Of each labelled record the two candidates are right or wrong independently of all others; they differ on a stated share
of them. The comparison is looked at after every ten.

    found   one challenger is better; the comparison is the first of its stream, or the tenth, which may spend less
            error. Without a horizon, so that each number is of one comparison
    false   the challenger is as good, or it is worse in the first half of the stream and as much better in the second,
            so that it is never better on average. Streams with a switch are counted; they are to be at most a share α
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Generator, Tensor

from jobs.reporting import Report
from simmatch.online.comparison import Comparison, ComparisonConfig
from simmatch.seeding import seeded

CHAMPION, CHALLENGER = "champion", "challenger"

BETTER = ((0.02, 0.03), (0.02, 0.1), (0.02, 0.3), (0.05, 0.1), (0.05, 0.3), (0.1, 0.3))
"""Difference of accuracies, and share of records on which they differ."""

NUMBERS = (1, 10)
"""Of the comparison."""

NEVER_BETTER = (0.0, 0.03), (0.0, 0.1), (0.0, 0.3), (0.05, 0.1)
"""How much the challenger is worse in the first half and better in the second, and the share."""

STREAMS, FALSE_STREAMS, LENGTH = 200, 500, 20_000
QUICK = 10
"""As many times fewer streams."""

LOOK, MOST = 10, 200_000

Differences = Callable[[int, Generator], Tensor]
"""(records so far, generator) → differences −1, 0, 1 of the next `LOOK` records."""


def measure(quick: bool, seed: int, report: Report) -> None:
    """Both, as rows and tables."""
    share = QUICK if quick else 1
    with report.progress(len(BETTER) + len(NEVER_BETTER)) as step:
        rows = []
        for difference, differ in BETTER:
            step(f"better by {100 * difference:g} points, different on {100 * differ:g} %")
            row: dict[str, object] = {"points": 100 * difference, "differ_percent": 100 * differ}
            for number in NUMBERS:
                draw = constant(difference, differ)
                found = [until_found(draw, number, seed + each) for each in range(STREAMS // share)]
                row |= {f"median_{number}": median(found), f"nine_of_ten_{number}": float(np.percentile(found, 90))}
            report.row(kind="better challenger", streams=STREAMS // share, **row)
            rows.append(row)
        headings = {"points": "points better", "differ_percent": "differ on, %"}
        for number, name in zip(NUMBERS, ("first comparison", "tenth"), strict=True):
            headings |= {f"median_{number}": f"{name}, median", f"nine_of_ten_{number}": "nine of ten"}
        report.rows_table("labelled records until a better challenger is champion", headings, rows)
        rows = []
        for points, differ in NEVER_BETTER:
            case = f"{100 * points:g} points worse, then better" if points else "equally good"
            step(f"{case}, different on {100 * differ:g} %")
            draw = worse_then_better(points, differ) if points else constant(0.0, differ)
            streams = FALSE_STREAMS // share
            switched = sum(switches(draw, seed + each) for each in range(streams))
            low, high = (100 * end for end in binomtest(switched, streams).proportion_ci())
            row = {"case": case, "differ_percent": 100 * differ, "switched": switched, "streams": streams}
            row |= {"percent": 100 * switched / streams, "low": low, "high": high}
            report.row(kind="false switches", alpha=ComparisonConfig().alpha, records=LENGTH, **row)
            rows.append(row)
        headings = {"case": "challenger", "differ_percent": "differ on, %", "streams": "streams",
                    "switched": "switched", "percent": "%", "low": "95 %, from", "high": "to"}  # fmt: skip
        report.rows_table(f"streams of {LENGTH:,} records with a false switch", headings, rows)


def constant(difference: float, differ: float) -> Differences:
    """A challenger that is better by `difference`, on records of which a share `differ` tells them apart.

    >>> draw = constant(0.1, 0.3)
    >>> float(torch.cat([draw(0, Generator().manual_seed(each)) for each in range(2000)]).float().mean()) > 0.08
    True
    """
    return lambda _, generator: _drawn(difference, differ, generator)


def worse_then_better(points: float, differ: float) -> Differences:
    """A challenger that is worse in the first half of `LENGTH` records, and as much better in the second."""
    return lambda seen, generator: _drawn(points if 2 * seen >= LENGTH else -points, differ, generator)


def _drawn(difference: float, differ: float, generator: Generator) -> Tensor:
    more, drawn = (differ + difference) / 2, torch.rand(LOOK, generator=generator)
    return (drawn < more).int() - ((drawn >= more) & (drawn < differ)).int()


def until_found(draw: Differences, number: int, seed: int) -> int:
    """Records until the challenger is champion in comparison `number`, at most `MOST`."""
    comparison = Comparison([CHAMPION, CHALLENGER], CHAMPION, ComparisonConfig(horizon=None))
    comparison.restore(comparison.state() | {"number": torch.tensor(number)})
    return _switched(comparison, draw, MOST, seed) or MOST


def switches(draw: Differences, seed: int) -> bool:
    """Whether a stream of `LENGTH` records has a switch, with the defaults."""
    return _switched(Comparison([CHAMPION, CHALLENGER], CHAMPION, ComparisonConfig()), draw, LENGTH, seed) > 0


def _switched(comparison: Comparison, draw: Differences, most: int, seed: int) -> int:
    """After how many records there is a switch; 0: none."""
    generator = seeded("simulated comparisons", seed)
    for seen in range(0, most, LOOK):
        differences = draw(seen, generator)
        if comparison.add({CHAMPION: differences < 0, CHALLENGER: differences > 0}) is not None:
            return seen + LOOK
    return 0
