"""What a comparison of starts tells: accuracies, paired differences with intervals, agreement, a chart.

A difference is taken seed by seed, in percentage points, between networks that share everything but their
convolutions' start and training; its 95 % interval is Student's, d̄ ± t(0.975, n − 1) s / √n over n seeds. Seeds vary
label subset, weights and order; the test images are the same, so the interval says nothing of other test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from jobs.evaluation.finetuning import BASELINE, STARTS, Outcome, StartName
from jobs.reporting import save_figure
from simmatch.encoder import Agreement

CONFIDENCE = 0.95
NONE = "–"
"""A cell without a value."""

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
"""Colour, told apart by the colour-blind too (Okabe and Ito 2008), and marker."""

APART = 1.04
"""Ratio of the places on the axis of two starts at one budget."""


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies, in percentage points.

    Attributes
    ----------
    mean: over seeds.
    half: half the length of its 95 % interval; None for one seed.
    count: seeds.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        """first − second, accuracies in [0, 1] by seed, in the same order of seeds.

        >>> Difference.of([0.75, 0.5], [0.5, 0.5]).mean
        12.5

        Raises
        ------
        ValueError
            Numbers of seeds that differ or are 0.
        """
        if len(first) != len(second) or not first:
            raise ValueError(f"expected as many seeds of both, at least one, got {len(first)} and {len(second)}")
        values = [100 * (one - other) for one, other in zip(first, second, strict=True)]
        count = len(values)
        half = None
        if count > 1:
            half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.fmean(values), half, count)

    def __str__(self) -> str:
        """
        >>> str(Difference(1.25, 0.31, 10)), str(Difference(-0.5, None, 1))
        ('+1.2 ± 0.3', '−0.5')
        """
        sign = "−" if self.mean < 0 else "+"
        return f"{sign}{abs(self.mean):.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


@dataclass(frozen=True)
class Line:
    """One network at one budget.

    Attributes
    ----------
    accuracy: by start, over seeds; every start has the same seeds.
    differences: of every other start and the random one.
    """

    network: str
    labels: int
    accuracy: dict[StartName, list[float]]
    differences: dict[StartName, Difference]


def lines_of(outcomes: Sequence[Outcome]) -> list[Line]:
    """Lines in the order in which networks and budgets first appear; only seeds that all starts have."""
    found: dict[tuple[str, int], dict[StartName, dict[int, float]]] = {}
    for each in outcomes:
        found.setdefault((each.network, each.labels), {}).setdefault(each.start, {})[each.seed] = each.accuracy
    lines = []
    for (network, labels), by_start in found.items():
        seeds = sorted(set.intersection(*(set(values) for values in by_start.values())))
        accuracy = {start: [by_start[start][seed] for seed in seeds] for start in STARTS if start in by_start}
        if not seeds or BASELINE not in accuracy:
            continue
        differences = {
            start: Difference.of(values, accuracy[BASELINE]) for start, values in accuracy.items() if start != BASELINE
        }
        lines.append(Line(network, labels, accuracy, differences))
    return lines


# -- tables ------------------------------------------------------------------------------------------------------------


HEADINGS = (
    "labels per class",
    "seeds",
    *WORDS.values(),
    *(f"{words} − {WORDS[BASELINE]}, points" for start, words in WORDS.items() if start != BASELINE),
)


def cells(line: Line) -> list[str]:
    """A line under `HEADINGS`."""
    accuracies = [_accuracy(line.accuracy.get(start)) for start in STARTS]
    differences = [str(line.differences.get(start, NONE)) for start in STARTS if start != BASELINE]
    return [str(line.labels), str(len(line.accuracy[BASELINE])), *accuracies, *differences]


def _accuracy(values: Sequence[float] | None) -> str:
    if not values:
        return NONE
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _title(network: str, channels: tuple[int, int]) -> str:
    return (
        f"{network}, {channels[0]} and {channels[1]} maps: test accuracy, mean ± standard deviation over seeds; paired "
        "differences with 95 % intervals"
    )


def accuracy_tables(lines: Sequence[Line], networks: Mapping[str, tuple[int, int]]) -> list[Table]:
    """One for each network."""
    tables = []
    for network, channels in networks.items():
        rows = [cells(line) for line in lines if line.network == network]
        tables.append(_rich(_title(network, channels), HEADINGS, rows))
    return tables


AGREEMENT_TITLE = "Agreement of the plain filters with the activities of their NSM layers, mean over seeds"
AGREEMENT_HEADINGS = ("network", "convolution", *(each.name for each in fields(Agreement)))


def agreement_cells(agreements: Mapping[str, Sequence[Sequence[Agreement]]]) -> list[list[str]]:
    """A line for each network and convolution.

    agreements: of each network, by seed and convolution.
    """
    return [
        [network, str(index), *(f"{statistics.fmean(values):.2f}" for values in zip(*map(astuple, some), strict=True))]
        for network, by_seed in agreements.items()
        for index, some in enumerate(zip(*by_seed, strict=True))
    ]


def agreement_table(agreements: Mapping[str, Sequence[Sequence[Agreement]]]) -> Table:
    return _rich(AGREEMENT_TITLE, AGREEMENT_HEADINGS, agreement_cells(agreements))


def _rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(escape(cell.replace("± ", "±")) for cell in row))
    return table


def markdown(
    lines: Sequence[Line],
    networks: Mapping[str, tuple[int, int]],
    agreements: Mapping[str, Sequence[Sequence[Agreement]]],
) -> str:
    """The same tables as GitHub sets them, each below its title."""
    parts = [
        _set_markdown(_title(network, channels), HEADINGS, [cells(line) for line in lines if line.network == network])
        for network, channels in networks.items()
    ]
    return "\n".join([*parts, _set_markdown(AGREEMENT_TITLE, AGREEMENT_HEADINGS, agreement_cells(agreements))])


def _set_markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    table = [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]
    return "\n".join([f"{title}:", "", *table, ""])


# -- MLflow, chart -----------------------------------------------------------------------------------------------------


def metrics(lines: Sequence[Line], agreements: Mapping[str, Sequence[Sequence[Agreement]]]) -> dict[str, float]:
    """`<network>/<start>/accuracy/<labels>`, `…/difference/<labels>`, `…/difference_half/<labels>`, agreement."""
    found: dict[str, float] = {}
    for line in lines:
        for start, values in line.accuracy.items():
            found[f"{line.network}/{start}/accuracy/{line.labels}"] = statistics.fmean(values)
        for start, known in line.differences.items():
            found[f"{line.network}/{start}/difference/{line.labels}"] = known.mean
            if known.half is not None:
                found[f"{line.network}/{start}/difference_half/{line.labels}"] = known.half
    for network, by_seed in agreements.items():
        for index, some in enumerate(zip(*by_seed, strict=True)):
            for each in fields(Agreement):
                value = statistics.fmean(getattr(known, each.name) for known in some)
                found[f"{network}/agreement/{each.name}/{index}"] = value
    return found


def difference_figure(lines: Sequence[Line]) -> Figure:
    """Differences against labels per class, with their intervals, a panel for each network."""
    networks = list(dict.fromkeys(line.network for line in lines))
    figure = Figure(figsize=(1.5 + 4.5 * max(1, len(networks)), 4.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(networks)), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=False):
        some = [line for line in lines if line.network == network]
        for index, (start, (colour, marker)) in enumerate(LOOKS.items()):
            known = [(line.labels, line.differences[start]) for line in some if start in line.differences]
            axes.errorbar(
                [labels * APART ** (index - 1) for labels, _ in known],
                [each.mean for _, each in known],
                yerr=[math.nan if each.half is None else each.half for _, each in known],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=3,
                label=WORDS[start],
            )
        axes.axhline(0.0, color="0.4", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks([line.labels for line in some], [str(line.labels) for line in some])
        axes.minorticks_off()
        axes.set_title(network.replace("$", r"\$"), fontsize=10)
        axes.set_xlabel("labels per class")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy less that from random weights, points")
    if lines:
        panels[0].legend(fontsize=9, frameon=False)
    figure.suptitle("Starts of the convolutions: paired differences, 95 % intervals over seeds", fontsize=10)
    return figure


def draw(lines: Sequence[Line], path: Path) -> None:
    """`difference_figure` as a file."""
    save_figure(difference_figure(lines), path)
