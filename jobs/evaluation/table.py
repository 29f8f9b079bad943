"""The table of an evaluation: for people, for the README and for MLflow.

A cell is mean ± sample standard deviation over seeds; the mean alone where there is one seed, '–' where there is none.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jobs.evaluation.summaries import CLEAN, COSTS, Estimate, Summary, labels_per_class

NONE = "–"
"""A cell without a value."""

NAME_WIDTH = 24
"""Columns of a terminal that a row's name may take; longer ones are broken."""

LONGEST_ROW = 100
"""Characters of a row's name in the name of a metric, which MLflow limits to 250 altogether."""


# -- cells -------------------------------------------------------------------------------------------------------------


def _accuracy(known: Estimate | None) -> str:
    if known is None:
        return NONE
    return f"{known.mean:.3f}" + ("" if known.spread is None else f" ± {known.spread:.3f}")


def _count(known: Estimate) -> str:
    return _rounded(known.mean, known.spread, 0)


def _measure(known: Estimate, unit: float = 1.0) -> str:
    """Three digits of the mean in this unit, at most three of them after the point."""
    mean, spread = known.mean / unit, (known.spread or 0.0) / unit
    return _rounded(mean, spread, min(3, max(0, 2 - math.floor(math.log10(mean)))) if mean > 0 else 0)


def _rounded(mean: float, spread: float | None, decimals: int) -> str:
    """A cost; seeds that agree exactly, as they do on parameters, have no spread to show."""
    return f"{mean:,.{decimals}f}" + (f" ± {spread:,.{decimals}f}" if spread else "")


def _per_layer(fractions: Sequence[Estimate]) -> str:
    percent = [100 * fraction.mean for fraction in fractions]
    return ", ".join(f"{value:.{0 if value >= 10 else 1}f}" for value in percent) or NONE


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sheet:
    """A table before it is set: cells of every row, the row's name first."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


Columns = dict[str, Callable[[Summary], str]]


def _sheet(title: str, summaries: Sequence[Summary], columns: Columns) -> _Sheet:
    """Columns in which no row has a value, and rows that have none, are left out."""
    filled = {heading: [cell(summary) for summary in summaries] for heading, cell in columns.items()}
    kept = {heading: cells for heading, cells in filled.items() if any(cell != NONE for cell in cells)}
    lines = zip([summary.row for summary in summaries], *kept.values(), strict=True)
    return _Sheet(title, ("", *kept), tuple(line for line in lines if any(cell != NONE for cell in line[1:])))


def _by_budget(summaries: Sequence[Summary], name: str) -> Columns:
    """Columns of `accuracy`, `kernel` or `transfer`."""
    known = {budget for summary in summaries for budget in getattr(summary, name)}
    return {budget: _of_key(name, budget) for budget in sorted(known, key=labels_per_class)}


def _of_key(name: str, key: str) -> Callable[[Summary], str]:
    return lambda summary: _accuracy(getattr(summary, name).get(key))


def _accuracy_sheet(summaries: Sequence[Summary]) -> _Sheet:
    columns: Columns = {"seeds": lambda summary: str(summary.seeds)}
    columns |= _by_budget(summaries, "accuracy")
    columns["all, logistic"] = lambda summary: _accuracy(summary.logistic)
    columns["nearest column of V"] = lambda summary: _accuracy(summary.decode)
    columns["10 nearest images"] = lambda summary: _accuracy(summary.neighbours)
    return _sheet("Test accuracy by labels per class; mean ± standard deviation over seeds", summaries, columns)


def _kernel_sheet(summaries: Sequence[Summary]) -> _Sheet:
    title = "Test accuracy of a kernel readout (closed form), by labels per class"
    return _sheet(title, summaries, _by_budget(summaries, "kernel"))


def _cost_sheet(summaries: Sequence[Summary]) -> _Sheet:
    columns: Columns = {
        "learn, s": lambda summary: _measure(summary.fit_seconds),
        # what takes no operations, the pixels themselves, is not encoded
        "encode, images/s": lambda summary: _measure(summary.images_per_second) if summary.operations.mean else NONE,
        "trained": lambda summary: _count(summary.parameters_trained),
        "inference": lambda summary: _count(summary.parameters_inference),
        "readout": lambda summary: _count(summary.parameters_readout),
        "million ops": lambda summary: _measure(summary.operations, 1e6),
        "active, %": lambda summary: _per_layer(summary.active_fraction),
    }
    title = (
        "Cost: parameters trained, for inference, of the readout; multiply–adds (ops) an image; active share by layer"
    )
    return _sheet(title, summaries, columns)


def _shift_sheet(summaries: Sequence[Summary]) -> _Sheet:
    columns: Columns = {
        CLEAN: _of_key("corruptions", CLEAN),
        "corrupted": lambda summary: _accuracy(summary.corrupted),
        "corrupted / clean": lambda summary: _accuracy(summary.relative),
    }
    for share in sorted({share for summary in summaries for share in summary.outliers}, key=float):
        columns[f"{100 * float(share):g} % noise"] = _of_key("outliers", share)
    title = "Test accuracy under corruptions (their mean), and after learning with noise for a share of the images"
    return _sheet(title, summaries, columns)


def _transfer_sheet(summaries: Sequence[Summary]) -> _Sheet:
    title = "Test accuracy on a data set not seen while learning, by labels per class"
    return _sheet(title, summaries, _by_budget(summaries, "transfer"))


def _rich(sheet: _Sheet) -> Table:
    table = Table(title=escape(sheet.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # with the sign at the spread, a narrow terminal breaks a cell in two lines at the only space, and nowhere else
    lines = [
        [textwrap.fill(name, NAME_WIDTH), *(cell.replace("± ", "±") for cell in rest)] for name, *rest in sheet.lines
    ]
    for index, heading in enumerate(sheet.headings):
        words = [word for text in (heading, *(line[index] for line in lines)) for word in text.split()]
        table.add_column(
            escape(heading),
            justify="right" if index else "left",
            no_wrap=index == 0,
            min_width=max(map(len, words), default=None),
        )
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def accuracy_table(summaries: Sequence[Summary]) -> Table:
    """Accuracy at every budget, of the nearest column of V and of the nearest images."""
    return _rich(_accuracy_sheet(summaries))


def kernel_table(summaries: Sequence[Summary]) -> Group:
    """The kernel readout at every budget, or nothing."""
    return Group(*(_rich(sheet) for sheet in _filled(_kernel_sheet(summaries))))


def cost_table(summaries: Sequence[Summary]) -> Table:
    """Seconds, rates, parameters, operations and activity."""
    return _rich(_cost_sheet(summaries))


def robustness_table(summaries: Sequence[Summary]) -> Group:
    """Two tables, or what there is of them: corruptions and noise; transfer to another data set."""
    return Group(*(_rich(sheet) for sheet in _filled(_shift_sheet(summaries), _transfer_sheet(summaries))))


def _filled(*sheets: _Sheet) -> list[_Sheet]:
    """Those with a column."""
    return [sheet for sheet in sheets if len(sheet.headings) > 1]


def description(summaries: Sequence[Summary]) -> str:
    """The tables of accuracy, as `markdown` sets them."""
    return "\n".join(_set_markdown(sheet) for sheet in (_accuracy_sheet(summaries), *_filled(_kernel_sheet(summaries))))


def markdown(summaries: Sequence[Summary]) -> str:
    """The same tables as GitHub sets them, each below its title."""
    few = _filled(_kernel_sheet(summaries))
    sheets = [_accuracy_sheet(summaries), *few, _cost_sheet(summaries)]
    sheets += _filled(_shift_sheet(summaries), _transfer_sheet(summaries))
    return "\n".join(_set_markdown(sheet) for sheet in sheets)


def _set_markdown(sheet: _Sheet) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = line(["---", *("---:" for _ in sheet.headings[1:])])
    # a bar would end the cell, a line break the table
    rows = (line([" ".join(name.split()).replace("|", "\\|"), *cells]) for name, *cells in sheet.lines)
    return "\n".join([f"{sheet.title}:", "", line(sheet.headings), rule, *rows, ""])


# -- MLflow ------------------------------------------------------------------------------------------------------------


def metrics(summaries: Sequence[Summary]) -> dict[str, float]:
    """Means by metric name, `<row>/accuracy/<budget>`; spreads of accuracies beside them, `<row>/accuracy_spread/…`.

    Characters of a row's name that MLflow refuses become '_', and a row whose name is then another's gets a number.
    """
    found: dict[str, float] = {}
    names: set[str] = set()
    for summary in summaries:
        row = _unlike(_safe(summary.row), names)
        names.add(row)
        for name, key, known in _accuracies_of(summary):
            found[f"{row}/{name}{key}"] = known.mean
            if known.spread is not None:
                found[f"{row}/{name}_spread{key}"] = known.spread
        for name in COSTS:
            found[f"{row}/{name}"] = getattr(summary, name).mean
        for layer, active in enumerate(summary.active_fraction):
            found[f"{row}/active_fraction/{layer}"] = active.mean
    return found


def _accuracies_of(summary: Summary) -> Iterator[tuple[str, str, Estimate]]:
    """Name of the accuracy, '/' and what it is by or nothing, estimate."""
    for name in ("accuracy", "kernel", "corruptions", "transfer", "outliers"):
        for key, known in getattr(summary, name).items():
            yield name, f"/{_safe(key)}", known
    for name in ("logistic", "decode", "neighbours", "corrupted", "relative"):
        known = getattr(summary, name)
        if known is not None:
            yield name, "", known


def _safe(text: str) -> str:
    """A part of a metric's name: letters, digits, '_', '-', '.', space; no dot ahead, '..' would lead elsewhere."""
    return re.sub(r"[^A-Za-z0-9_.\- ]|^\.", "_", text.strip())[:LONGEST_ROW] or "_"


def _unlike(name: str, others: set[str]) -> str:
    unlike, number = name, 2
    while unlike in others:
        unlike, number = f"{name}-{number}", number + 1
    return unlike
