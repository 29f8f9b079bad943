"""Results summarised over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from jobs.evaluation.results import Result

CLEAN = "clean"
"""Key of `Result.corruptions` that is none."""

COSTS = (
    "fit_seconds",
    "images_per_second",
    "parameters_trained",
    "parameters_inference",
    "parameters_readout",
    "operations",
)
"""Fields of a result and of a summary that every row has, and that are no accuracies."""


@dataclass(frozen=True)
class Estimate:
    """A quantity over seeds.

    Attributes
    ----------
    mean: over seeds.
    spread: sample standard deviation, √(Σ (v − mean)² / (count − 1)); None for one seed.
    count: seeds.
    """

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """
        >>> Estimate.of([0.5, 1.0])
        Estimate(mean=0.75, spread=0.3535533905932738, count=2)
        """
        known = [float(value) for value in values]
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Summary:
    """A row over its seeds; fields as in `Result`.

    Attributes
    ----------
    seeds: how many there are of the row; a quantity may be known for fewer.
    active_fraction: per layer.
    accuracy, kernel, transfer: by budget, the smallest first and 'all' last.
    corruptions: by corruption, `clean` on the same images without one.
    corrupted: mean over the corruptions of a seed.
    relative: that mean over the seed's clean accuracy.
    outliers: by share of noise among the training images, the smallest first.
    """

    row: str
    seeds: int
    accuracy: dict[str, Estimate]
    kernel: dict[str, Estimate]
    logistic: Estimate | None
    decode: Estimate | None
    neighbours: Estimate | None
    fit_seconds: Estimate
    images_per_second: Estimate
    active_fraction: tuple[Estimate, ...]
    parameters_trained: Estimate
    parameters_inference: Estimate
    parameters_readout: Estimate
    operations: Estimate
    corruptions: dict[str, Estimate]
    corrupted: Estimate | None
    relative: Estimate | None
    transfer: dict[str, Estimate]
    outliers: dict[str, Estimate]


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Summaries in the order in which rows first appear.

    Raises
    ------
    ValueError
        Two results of one row and seed, which would make the spread too small.
    """
    rows: dict[str, dict[int, Result]] = {}
    for result in results:
        seeds = rows.setdefault(result.row, {})
        if result.seed in seeds:
            raise ValueError(f"results: expected one per row and seed, got two of '{result.row}', seed {result.seed}")
        seeds[result.seed] = result
    return [_summary(row, list(seeds.values())) for row, seeds in rows.items()]


def labels_per_class(budget: str) -> float:
    """Labels per class as a number that sorts: 'all' is above every other.

    >>> sorted(["all", "100", "50"], key=labels_per_class)
    ['50', '100', 'all']
    """
    return float(budget) if budget.isdecimal() else math.inf


def _summary(row: str, found: list[Result]) -> Summary:
    means = [_corrupted(result) for result in found]
    return Summary(
        row=row,
        seeds=len(found),
        accuracy=_by_key([result.accuracy for result in found], labels_per_class),
        kernel=_by_key([result.kernel for result in found], labels_per_class),
        logistic=_known(result.logistic for result in found),
        decode=_known(result.decode for result in found),
        neighbours=_known(result.neighbours for result in found),
        active_fraction=tuple(filter(None, map(_known, zip_longest(*(result.active_fraction for result in found))))),
        corruptions=_by_key([result.corruptions for result in found]),
        corrupted=_known(means),
        relative=_known(
            mean / clean if mean is not None and (clean := result.corruptions.get(CLEAN)) else None
            for mean, result in zip(means, found, strict=True)
        ),
        transfer=_by_key([result.transfer for result in found], labels_per_class),
        outliers=_by_key([result.outliers for result in found], float),
        **{name: Estimate.of(getattr(result, name) for result in found) for name in COSTS},
    )


def _known(values: Iterable[float | None]) -> Estimate | None:
    """Of the values that there are."""
    known = [value for value in values if value is not None]
    return Estimate.of(known) if known else None


def _corrupted(result: Result) -> float | None:
    values = [value for name, value in result.corruptions.items() if name != CLEAN]
    return statistics.fmean(values) if values else None


def _by_key(found: Sequence[Mapping[str, float]], order: Callable[[str], float] | None = None) -> dict[str, Estimate]:
    """Estimates by key, in the given order or the one in which keys appear."""
    keys = list(dict.fromkeys(key for values in found for key in values))
    if order is not None:
        keys.sort(key=order)
    return {key: known for key in keys if (known := _known(values.get(key) for values in found))}
