"""Results of a comparison: one for each row and seed, all of them as one long table.

Tables, charts and MLflow metrics all read `estimates`: mean, standard deviation and count over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from pydantic import BaseModel, ConfigDict

CLEAN = "clean"
"""Key of `RowResult.corruptions` for the images without a corruption."""

COSTS = (
    "fit_seconds",
    "images_per_second",
    "parameters_trained",
    "parameters_inference",
    "parameters_readout",
    "operations",
)
"""Fields of a result that are not accuracies and that every row has."""

MEASURES = ("accuracy", "kernel", "logistic", "decode", "neighbours", "corruptions", "transfer", "outliers")
"""Fields of a result that are test accuracies."""

DERIVED = ("active_fraction", "corrupted", "relative")
"""The other measures of `long_table`."""


class RowResult(BaseModel):
    """One row with one seed. Budgets are labels per class, or 'all'; accuracies are on the test images."""

    model_config = ConfigDict(extra="forbid")

    row: str
    seed: int
    settings: str
    """The candidate that was chosen on held-out images."""

    features: int
    """Length of the feature vector that the readout sees."""

    parameters_trained: int
    parameters_inference: int
    parameters_readout: int = 0
    operations: int
    """Multiply–adds per image, without pooling and readout."""

    fit_seconds: float
    images_per_second: float
    """Encoding rate. This and `fit_seconds` count the layers that the row uses and those below."""

    active_fraction: list[float] = []
    """Per layer."""

    held_out: dict[str, float] = {}
    """Budget → accuracy on the held-out images, by which settings and penalties were chosen; also under `logistic` and
    `kernel <budget>`."""

    accuracy: dict[str, float] = {}
    """Budget → accuracy of a ridge readout, or of the network itself."""

    kernel: dict[str, float] = {}
    """Budget → accuracy of a kernel readout."""

    logistic: float | None = None
    """Accuracy of a logistic readout with all labels."""

    decode: float | None = None
    """Accuracy of the nearest column of V: no trained classifier."""

    neighbours: float | None = None
    """Accuracy of the vote of the ten nearest training images."""

    corruptions: dict[str, float] = {}
    """Corruption → accuracy on the first test images; `clean`: on the same images without a corruption."""

    transfer: dict[str, float] = {}
    """Budget → accuracy on the data set that the row has not learnt from."""

    outliers: dict[str, float] = {}
    """Share of noise among the training images → accuracy."""


def budget_name(budget: int | None) -> str:
    """
    >>> budget_name(None), budget_name(10)
    ('all', '10')
    """
    return "all" if budget is None else str(budget)


def key_rank(key: str) -> float:
    """A number to sort budgets and shares by: 'all' and names come last, and keep their order.

    >>> sorted(["all", "100", "50"], key=key_rank)
    ['50', '100', 'all']
    """
    try:
        return float(key)
    except ValueError:
        return math.inf


def long_table(results: Sequence[RowResult]) -> pd.DataFrame:
    """One line for each value: columns row, seed, measure, key, value.

    `measure` is the name of a field of `RowResult`; `key` is the budget, corruption, share of noise or layer, '' for a
    single number. Two measures are derived: `corrupted`, the mean accuracy over the corruptions of a seed, and
    `relative`, that mean over the accuracy on clean images.

    Raises
    ------
    ValueError
        Two results of the same row and seed.
    """
    seen: set[tuple[str, int]] = set()
    for result in results:
        if (result.row, result.seed) in seen:
            raise ValueError(f"results: expected one per row and seed, got two of '{result.row}', seed {result.seed}")
        seen.add((result.row, result.seed))
    lines = [
        (result.row, result.seed, measure, key, float(value))
        for result in results
        for measure, key, value in _values(result)
    ]
    return pd.DataFrame(lines, columns=["row", "seed", "measure", "key", "value"])


def _values(result: RowResult) -> Iterator[tuple[str, str, float]]:
    """(measure, key, value) for every number of a result."""
    for measure in (*COSTS, *MEASURES):
        values = getattr(result, measure)
        if isinstance(values, dict):
            yield from ((measure, key, value) for key, value in values.items())
        elif values is not None:
            yield measure, "", values
    yield from (("active_fraction", str(layer), value) for layer, value in enumerate(result.active_fraction))
    shifted = [value for name, value in result.corruptions.items() if name != CLEAN]
    if shifted:
        corrupted = math.fsum(shifted) / len(shifted)
        yield "corrupted", "", corrupted
        if clean := result.corruptions.get(CLEAN):
            yield "relative", "", corrupted / clean


def estimates(results: Sequence[RowResult]) -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for one seed) and count over seeds, indexed by (row, measure, key).

    Rows are in the order in which they first appear in the results, measures in the order of `long_table`, keys that
    are numbers or budgets rise, and other keys keep their order.
    """
    table = long_table(results)
    known = table.groupby(["row", "measure", "key"], sort=False)["value"].agg(["mean", "std", "count"])
    rows = {row: place for place, row in enumerate(table["row"].unique())}
    measures = {measure: place for place, measure in enumerate((*COSTS, *MEASURES, *DERIVED))}
    order = sorted(known.index, key=lambda at: (rows[at[0]], measures[at[1]], key_rank(at[2])))
    return known.reindex(pd.MultiIndex.from_tuples(order, names=known.index.names)) if order else known


def of_measure(known: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The estimates of one measure, indexed by (row, key)."""
    return known[known.index.get_level_values("measure") == measure].droplevel("measure")


def by_row(known: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The estimates of a measure that has one value for each row, indexed by row."""
    return of_measure(known, measure).droplevel("key")
