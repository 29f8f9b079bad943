"""The tables of a comparison, for a terminal, Markdown and MLflow; all read `jobs.evaluation.results.estimates`.

A cell is mean ± sample standard deviation over seeds; the mean alone for one seed, '–' where nothing was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable

import pandas as pd

from jobs.evaluation.results import CLEAN, COSTS, by_row, key_rank, of_measure
from jobs.reporting import Table

LONGEST_ROW = 100
"""Characters of a row's name in the name of a metric, which MLflow limits to 250 in all."""


# -- cells -------------------------------------------------------------------------------------------------------------


def accuracy_cell(mean: float, std: float) -> str:
    """
    >>> accuracy_cell(0.87651, 0.0042), accuracy_cell(0.5, math.nan)
    ('0.877 ± 0.004', '0.500')
    """
    return f"{mean:.3f}" + ("" if math.isnan(std) else f" ± {std:.3f}")


def _count_cell(mean: float, std: float) -> str:
    return _rounded(mean, std, 0)


def _quantity_cell(mean: float, std: float) -> str:
    """Three digits of the mean, at most three of them after the point."""
    return _rounded(mean, std, min(3, max(0, 2 - math.floor(math.log10(mean)))) if mean > 0 else 0)


def _millions_cell(mean: float, std: float) -> str:
    return _quantity_cell(mean / 1e6, std / 1e6)


def _rounded(mean: float, std: float, decimals: int) -> str:
    """A cost; seeds that agree exactly, as they do on parameters, have no standard deviation to show."""
    return f"{mean:,.{decimals}f}" + (f" ± {std:,.{decimals}f}" if std > 0 else "")


def _cells(known: pd.DataFrame, form: Callable[[float, float], str], name: str = "") -> pd.Series:
    """A text for each line of the estimates."""
    texts = [form(mean, std) for mean, std in zip(known["mean"], known["std"], strict=True)]
    return pd.Series(texts, index=known.index, name=name, dtype=object)


def _by_key(known: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Accuracies of a measure, a column for each key."""
    some = of_measure(known, measure)
    if some.empty:
        return pd.DataFrame()
    keys = sorted(some.index.unique("key"), key=key_rank)
    return _cells(some, accuracy_cell).unstack("key", sort=False)[keys]


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(title: str, known: pd.DataFrame, *columns: pd.Series | pd.DataFrame) -> list[Table]:
    """A table of columns of texts by row, without rows and columns that are empty; none if nothing is left."""
    columns = tuple(column for column in columns if len(column))
    if not columns:
        return []
    texts = pd.concat(columns, axis=1).reindex(known.index.unique("row"))
    texts = texts.dropna(axis=1, how="all").dropna(how="all")
    return [Table(title, ("", *texts.columns), list(texts.itertuples(name=None)))] if len(texts) else []


def accuracy_tables(known: pd.DataFrame) -> list[Table]:
    """Accuracy at every budget: of the linear readout with others beside it, and of the kernel readout."""
    seeds = by_row(known, "fit_seconds")["count"].astype(str).rename("seeds")
    others = {"logistic": "all, logistic", "decode": "nearest column of V", "neighbours": "10 nearest images"}
    columns = [_cells(by_row(known, measure), accuracy_cell, heading) for measure, heading in others.items()]
    title = "Test accuracy by labels per class; mean ± standard deviation over seeds"
    kernel = "Test accuracy of a kernel readout (closed form), by labels per class"
    return [
        *_table(title, known, seeds, _by_key(known, "accuracy"), *columns),
        *_table(kernel, known, _by_key(known, "kernel")),
    ]


def cost_tables(known: pd.DataFrame) -> list[Table]:
    """Seconds, rates, parameters, operations and activity."""
    operations = by_row(known, "operations")
    # pixels take no operations: nothing is encoded
    encoded = by_row(known, "images_per_second")[operations["mean"] > 0]
    active = of_measure(known, "active_fraction")["mean"].groupby("row", sort=False).agg(_percentages)
    title = (
        "Cost: parameters (trained, for inference, of the readout); multiply–adds (ops) per image; "
        "active share by layer"
    )
    return _table(
        title,
        known,
        _cells(by_row(known, "fit_seconds"), _quantity_cell, "learn, s"),
        _cells(encoded, _quantity_cell, "encode, images/s"),
        _cells(by_row(known, "parameters_trained"), _count_cell, "trained"),
        _cells(by_row(known, "parameters_inference"), _count_cell, "inference"),
        _cells(by_row(known, "parameters_readout"), _count_cell, "readout"),
        _cells(operations, _millions_cell, "million ops"),
        active.rename("active, %"),
    )


def _percentages(fractions: pd.Series) -> str:
    percent = [100 * fraction for fraction in fractions]
    return ", ".join(f"{value:.{0 if value >= 10 else 1}f}" for value in percent)


def shift_tables(known: pd.DataFrame) -> list[Table]:
    """Accuracy on corrupted images and after learning with noise; on a data set that was not learnt from."""
    outliers = _by_key(known, "outliers")
    title = "Test accuracy under corruptions (mean), and after learning from images of which a share is noise"
    transfer = "Test accuracy on a data set that was not learnt from, by labels per class"
    return [
        *_table(
            title,
            known,
            _by_key(known, "corruptions").filter([CLEAN]),
            _cells(by_row(known, "corrupted"), accuracy_cell, "corrupted"),
            _cells(by_row(known, "relative"), accuracy_cell, "corrupted / clean"),
            outliers.rename(columns=lambda share: f"{100 * float(share):g} % noise"),
        ),
        *_table(transfer, known, _by_key(known, "transfer")),
    ]


def comparison_tables(known: pd.DataFrame) -> list[Table]:
    """Every table that has a value."""
    return [] if known.empty else [*accuracy_tables(known), *cost_tables(known), *shift_tables(known)]


def markdown(tables: Iterable[Table]) -> str:
    """Tables as GitHub sets them, each below its title."""
    return "\n".join(table.markdown() for table in tables)


# -- MLflow ------------------------------------------------------------------------------------------------------------


def metrics(known: pd.DataFrame) -> dict[str, float]:
    """Means by metric name, `<row>/<measure>/<key>`; standard deviations of accuracies as `<row>/<measure>_spread/…`.

    Characters of a row's name that MLflow refuses become '_'; a row whose name is then another's gets a number.
    """
    values: dict[str, float] = {}
    names: dict[str, str] = {}
    for (row, measure, key), mean, std in zip(known.index, known["mean"], known["std"], strict=True):
        if row not in names:
            names[row] = _distinct(_safe(row), names.values())
        suffix = f"/{_safe(key)}" if key else ""
        values[f"{names[row]}/{measure}{suffix}"] = mean
        if measure not in (*COSTS, "active_fraction") and not math.isnan(std):
            values[f"{names[row]}/{measure}_spread{suffix}"] = std
    return values


def _safe(text: str) -> str:
    """A part of a metric's name: letters, digits, '_', '-', '.', space; it does not begin with a dot."""
    return re.sub(r"[^A-Za-z0-9_.\- ]|^\.", "_", text.strip())[:LONGEST_ROW] or "_"


def _distinct(name: str, others: Collection[str]) -> str:
    distinct, number = name, 2
    while distinct in others:
        distinct, number = f"{name}-{number}", number + 1
    return distinct
