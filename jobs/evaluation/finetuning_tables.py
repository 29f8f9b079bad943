"""The tables, metrics and chart of a comparison of starts: accuracies, paired differences, agreement of filters.

A difference is taken seed by seed, in percentage points, between networks that share everything but the start and
training of their convolutions; its 95 % interval is Student's for pairs. Seeds vary label subset, weights and order;
the test images are the same, so the interval does not describe other test images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from jobs.evaluation.finetuning import BASELINE, STARTS, StartName, StartResult
from jobs.evaluation.tables import accuracy_cell
from jobs.reporting import Table
from simmatch.agreement import Agreement

CONFIDENCE = 0.95

WORDS: Mapping[StartName, str] = {
    "random": "random",
    "random_frozen": "random, frozen",
    "nsm_frozen": "NSM, frozen",
    "nsm": "NSM, fine-tuned",
}

LOOKS: Mapping[StartName, tuple[str, str]] = {
    "random_frozen": ("#888888", "^"),
    "nsm_frozen": ("#D55E00", "s"),
    "nsm": ("#0072B2", "o"),
}
"""Colour (Okabe and Ito 2008, distinct to the colour-blind too) and marker."""

APART = 1.04
"""Ratio of the places on the axis of two starts at one budget."""


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of first − second in percentage points, and half the length of its 95 % interval (NaN for one seed).

    >>> paired_difference([0.75], [0.5])
    (25.0, nan)

    Parameters
    ----------
    first, second: accuracies in [0, 1], in the same order of seeds.

    Raises
    ------
    ValueError
        Numbers of seeds that differ or are 0.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"expected as many seeds of both, at least one, got {len(first)} and {len(second)}")
    mean = 100 * sum(one - other for one, other in zip(first, second, strict=True)) / len(first)
    if len(first) == 1:
        return mean, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences: the interval has length 0
        interval = ttest_rel(first, second).confidence_interval(CONFIDENCE)
    return mean, 50 * float(interval.high - interval.low)


def estimates(results: Sequence[StartResult]) -> pd.DataFrame:
    """Accuracies and paired differences over seeds, indexed by (network, labels, start).

    Columns: `mean`, `std` (NaN for one seed) and `count` of the accuracy; `difference` from the random start and `half`
    the length of its interval, in percentage points, NaN for the random start itself. Only seeds that all starts have
    count. Networks and budgets are in the order in which they first appear.
    """
    columns = ["network", "labels", "start", "mean", "std", "count", "difference", "half"]
    table = pd.DataFrame([result.model_dump() for result in results], columns=[*StartResult.model_fields])
    lines = []
    for (network, labels), some in table.groupby(["network", "labels"], sort=False):
        by_seed = some.pivot(index="seed", columns="start", values="accuracy").dropna()
        if by_seed.empty or BASELINE not in by_seed:
            continue
        for start in (each for each in STARTS if each in by_seed):
            values = by_seed[start]
            paired = (math.nan, math.nan) if start == BASELINE else paired_difference(values, by_seed[BASELINE])
            lines.append((network, labels, start, values.mean(), values.std(), len(values), *paired))
    return pd.DataFrame(lines, columns=columns).set_index(["network", "labels", "start"])


# -- tables ------------------------------------------------------------------------------------------------------------


HEADINGS = (
    "labels per class",
    "seeds",
    *WORDS.values(),
    *(f"{words} − {WORDS[BASELINE]}, points" for start, words in WORDS.items() if start != BASELINE),
)


def difference_cell(mean: float, half: float) -> str:
    """
    >>> difference_cell(1.25, 0.31), difference_cell(-0.5, math.nan)
    ('+1.2 ± 0.3', '−0.5')
    """
    sign = "−" if mean < 0 else "+"
    return f"{sign}{abs(mean):.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def accuracy_tables(known: pd.DataFrame, networks: Mapping[str, tuple[int, int]]) -> list[Table]:
    """One for each network; `networks`: name → maps of its two convolutions."""
    texts = pd.DataFrame(
        {
            "accuracy": list(map(accuracy_cell, known["mean"], known["std"])),
            "difference": list(map(difference_cell, known["difference"], known["half"])),
        },
        index=known.index,
    ).unstack("start", sort=False)
    others = [start for start in STARTS if start != BASELINE]
    texts = texts.reindex(columns=[*(("accuracy", start) for start in STARTS), *(("difference", s) for s in others)])
    seeds = known["count"].groupby(["network", "labels"], sort=False).first()
    tables = []
    for network, channels in networks.items():
        rows = [
            (str(labels), str(seeds[name, labels]), *cells)
            for (name, labels), *cells in texts.itertuples(name=None)
            if name == network
        ]
        title = (
            f"{network}, {channels[0]} and {channels[1]} maps: test accuracy, mean ± standard deviation over seeds; "
            "paired differences with 95 % intervals"
        )
        tables.append(Table(title, HEADINGS, rows))
    return tables


def agreement_estimates(agreements: Mapping[str, Sequence[Sequence[Agreement]]]) -> pd.DataFrame:
    """Mean over seeds of each field of `Agreement`, indexed by (network, convolution).

    agreements: of each network, by seed and convolution.
    """
    lines = [
        {"network": network, "convolution": index, **asdict(agreement)}
        for network, by_seed in agreements.items()
        for of_seed in by_seed
        for index, agreement in enumerate(of_seed)
    ]
    return pd.DataFrame(lines).groupby(["network", "convolution"], sort=False).mean()


def agreement_table(known: pd.DataFrame) -> Table:
    """`agreement_estimates` for people."""
    rows = [
        (network, str(index), *(f"{value:.2f}" for value in values))
        for (network, index), *values in known.itertuples(name=None)
    ]
    title = "Agreement of the plain filters with the activities of their NSM layers, mean over seeds"
    return Table(title, ("network", "convolution", *known.columns), rows)


# -- MLflow, chart -----------------------------------------------------------------------------------------------------


def metrics(known: pd.DataFrame, agreement: pd.DataFrame) -> dict[str, float]:
    """`<network>/<start>/accuracy/<labels>`, `…/difference/<labels>`, `…/difference_half/<labels>`, agreement."""
    columns = {"mean": "accuracy", "difference": "difference", "half": "difference_half"}
    values = {
        f"{network}/{start}/{name}/{labels}": value
        for column, name in columns.items()
        for (network, labels, start), value in known[column].dropna().items()
    }
    for field, by_convolution in agreement.items():
        for (network, index), value in by_convolution.items():
            values[f"{network}/agreement/{field}/{index}"] = value
    return values


def difference_figure(known: pd.DataFrame) -> Figure:
    """Differences against labels per class, with their intervals, a panel for each network."""
    networks = known.index.unique("network")
    figure = Figure(figsize=(1.5 + 4.5 * max(1, len(networks)), 4.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(networks)), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=False):
        some = known.xs(network, level="network")
        for index, (start, (colour, marker)) in enumerate(LOOKS.items()):
            line = some[some.index.get_level_values("start") == start].droplevel("start")
            axes.errorbar(
                line.index * APART ** (index - 1),
                line["difference"],
                yerr=line["half"],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=3,
                label=WORDS[start],
            )
        budgets = list(some.index.unique("labels"))
        axes.axhline(0.0, color="0.4", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(budgets, [str(labels) for labels in budgets])
        axes.minorticks_off()
        axes.set_title(network.replace("$", r"\$"), fontsize=10)
        axes.set_xlabel("labels per class")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy minus that from random weights, percentage points")
    if len(networks):
        panels[0].legend(fontsize=9, frameon=False)
    figure.suptitle("Starts of the convolutions: paired differences, 95 % intervals over seeds", fontsize=10)
    return figure
