"""The report of a stream, for a decision between its candidates: RUN_DIR/report.md and RUN_DIR/figures/report.png.

It reads what the job has written so far, RUN_DIR/seen.json and the configuration beside it: while the job runs, and
after. Costs are

    processor   seconds of processor of a candidate, per 1,000 records, at `price_cpu_hour`
    storage     the journal of 1,000 records, kept for one month, at `price_gb_month`

The bytes of a candidate's state do not grow with the records: their price is given per month.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.text import count, size
from jobs.reporting import Table, cell, save_figure
from jobs.streaming.config import StreamConfig
from jobs.streaming.history import Kept, load, points_of
from jobs.streaming.page import ReportConfig, moment
from jobs.streaming.totals import CandidateTotals, Point, accuracies, novelties
from simmatch.config import ConfigError
from simmatch.documents import shortened
from simmatch.files import write_whole

FILE, FIGURE = "report.md", "figures/report.png"
HOUR_S, GIGABYTE, THOUSAND = 3600.0, 1e9, 1000.0

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKED = {"drift": "#d1242f", "champion": "#8250df"}
ALARMS = ("drift", "novelty")
"""Kinds of events that are alarms."""

LEAST_RANGE = 10.0
"""Of the axis of accuracies, in percent."""

SHOWN = 50
"""Latest events in the report."""


def report(run_dir: Path, config: StreamConfig) -> Path:
    """Write the report and its figure; returns its path.

    Raises
    ------
    ConfigError
        The run directory holds nothing of a stream.
    OSError
        The disk did not take it.
    """
    kept = load(run_dir)
    if kept is None or kept.latest is None:
        raise ConfigError(f"--run-dir: expected the folder of a stream that has learnt from a batch, got {run_dir}")
    points = points_of(kept)
    save_figure(figure(kept, points, config.page.window), run_dir / FIGURE)
    write_whole(run_dir / FILE, text(kept, points, config))
    return run_dir / FILE


def text(kept: Kept, points: Sequence[Point], config: StreamConfig) -> str:
    """The report as Markdown."""
    latest, prices = points[-1], config.report
    parts = [
        f"# Stream {plain(kept.name)}",
        "",
        f"State: {plain(kept.state)}. {count(latest.records, 'record')}, {count(latest.windows, 'window')}, "
        f"{latest.batch:,} batches; time of the newest record: {moment(latest.time)}; "
        f"written {moment(kept.written)}.",
        "",
        f"{count(latest.labels, 'window')} learnt with a label ({_percent(latest.labels, latest.windows)} of all, "
        f"{latest.late:,} late); {count(latest.came, 'label')} came; {latest.faults:,} set aside; "
        f"{count(latest.duplicates, 'duplicate')}; "
        f"champion: **{plain(latest.champion)}**.",
        "",
        f"![accuracy and alarms over records]({FIGURE})",
        "",
        _accuracy(points, config.page.window).markdown(),
        _costs(latest, prices).markdown(),
        *_decision(latest),
        "",
        _alarms(kept, latest).markdown(),
        _other_events(kept),
        "",
        _events(kept).markdown(),
    ]
    return "\n".join(parts)


def plain(value: object) -> str:
    """Text from outside as Markdown shows it, in a table too: no markup, no line break.

    >>> print(plain("a|b <i>*c*"))
    a&#124;b &lt;i&gt;\\*c\\*
    """
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
    shown = shortened(str(value), 300)
    return "".join(entities.get(each, f"\\{each}" if each in "\\`*_{}[]()#+-!~" else each) for each in shown)


def costs(candidate: CandidateTotals, latest: Point, prices: ReportConfig) -> dict[str, float | None]:
    """What a candidate costs: processor and storage per 1,000 records, and their sum; its state per month.

    >>> latest = Point(records=2000, journal_bytes=4_000_000)
    >>> prices = ReportConfig(price_cpu_hour=0.36, price_gb_month=0.02)
    >>> costs(CandidateTotals(seconds=10.0, state_bytes=5 * 10**8), latest, prices)["processor"]
    0.0005
    """
    thousands = latest.records / THOUSAND
    processor = candidate.seconds / HOUR_S * prices.price_cpu_hour / thousands if thousands else None
    storage = latest.journal_bytes / GIGABYTE * prices.price_gb_month / thousands if thousands else None
    both = None if processor is None or storage is None else processor + storage
    state = candidate.state_bytes / GIGABYTE * prices.price_gb_month
    return {"processor": processor, "storage": storage, "sum": both, "state": state}


def _accuracy(points: Sequence[Point], window: int) -> Table:
    latest, rows = points[-1], []
    for name, each in latest.candidates.items():
        recent = accuracies(points, name, window)[-1]
        low, mean, high = each.difference or (None, None, None)
        known = mean is not None and low is not None and high is not None
        rows.append(
            (
                plain(name) + (" (champion)" if name == latest.champion else ""),
                _percent(each.right, each.answered),
                None if recent is None else f"{100 * recent:.1f} %",
                f"{each.answered:,}",
                f"{100 * mean:+.2f}" if mean is not None and known else None,
                f"{100 * low:+.2f} to {100 * high:+.2f}" if low is not None and high is not None else None,
            )
        )
    headings = (
        "candidate",
        "accuracy",
        f"latest {window}",
        "answers with a label",
        "less the champion's, points",
        "interval that holds at all times",
    )
    return Table("Prequential accuracy: every answer was given before its label was learnt", headings, rows)


def _costs(latest: Point, prices: ReportConfig) -> Table:
    rows = []
    for name, each in latest.candidates.items():
        price = costs(each, latest, prices)
        rows.append(
            (
                plain(name),
                f"{each.seconds:,.1f}",
                cell(1e6 * each.seconds / latest.records) if latest.records else None,
                size(each.state_bytes),
                size(latest.journal_bytes),
                _money(price["processor"], prices),
                _money(price["storage"], prices),
                _money(price["sum"], prices),
                _money(price["state"], prices),
            )
        )
    headings = (
        "candidate",
        "processor, s",
        "µs a record",
        "state",
        "journal, common to all",
        "processor, 1,000 records",
        "journal, 1,000 records for a month",
        "both",
        "state, a month",
    )
    title = (
        f"Costs in {plain(prices.price_label)}, at {prices.price_cpu_hour:g} per hour of one processor and "
        f"{prices.price_gb_month:g} per gigabyte and month. The whole process: {latest.process_s:,.1f} s of processor"
    )
    return Table(title, headings, rows)


def _decision(latest: Point) -> list[str]:
    """One line a challenger: what its interval says."""
    lines = []
    for name, each in latest.candidates.items():
        if name == latest.champion:
            continue
        if each.difference is None:
            lines.append(f"- {plain(name)}: not compared yet.")
            continue
        low, _, high = each.difference
        words = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        lines.append(f"- {plain(name)}: {words} the champion.")
    return lines


def _alarms(kept: Kept, latest: Point) -> Table:
    kinds = [("drifts", kept.counts.get("drift", 0)), ("batches with novel windows", kept.counts.get("novelty", 0))]
    per_candidate = [(f"drifts of {plain(name)}", each.drifts) for name, each in latest.candidates.items()]
    windows = [
        (f"windows of {plain(name)} above its threshold", each.novel) for name, each in latest.candidates.items()
    ]
    rows = [(name, number, _per_million(number, latest.records)) for name, number in (*kinds, *per_candidate, *windows)]
    return Table("Alarms", ("what", "number", "per million records"), rows)


def _other_events(kept: Kept) -> str:
    others = [f"{number:,} × {plain(kind)}" for kind, number in sorted(kept.counts.items()) if kind not in ALARMS]
    return f"Other events: {', '.join(others) or 'none'}."


def _events(kept: Kept) -> Table:
    rows = [
        (f"{event.number:,}", moment(event.time), event.kind, plain(event.text))
        for event in reversed(kept.events[-SHOWN:])
    ]
    return Table(f"Latest of {count(sum(kept.counts.values()), 'event')}", ("record", "its time", "kind", ""), rows)


def figure(kept: Kept, points: Sequence[Point], window: int) -> Figure:
    """Accuracy, novelty and labels over records, with drifts and switches."""
    drawn = Figure(figsize=(10, 8), layout="constrained")
    accuracy, novelty, labels = drawn.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1.5])
    records = [point.records for point in points]
    names = list(dict.fromkeys(name for point in points for name in point.candidates))
    for index, name in enumerate(names):
        values = accuracies(points, name, window)
        colour, dashes = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
        accuracy.plot(records, 100 * _floats(values), dashes, color=colour, linewidth=1.2, label=_label(name))
        scores = novelties(points, name)
        novelty.plot(records, _floats(scores), dashes, color=colour, linewidth=1.0)
    accuracy.set_ylabel(f"prequential accuracy, latest {window}, %")
    low, high = accuracy.dataLim.intervaly
    if high - low < LEAST_RANGE:  # not where nothing is known: infinite limits
        high = min(100.0, (low + high + LEAST_RANGE) / 2)
        accuracy.set_ylim(high - LEAST_RANGE, high + LEAST_RANGE / 30)
    novelty.set_ylabel("mean novelty")
    labels.plot(records, [point.labels for point in points], color="#0072B2", label="windows learnt with a label")
    labels.plot(records, [point.faults for point in points], color="#D55E00", label="set aside")
    labels.set_xlabel("records")
    labels.set_ylim(bottom=0, top=None if points[-1].labels or points[-1].faults else 1)
    for axes in (accuracy, novelty, labels):
        axes.grid(alpha=0.3)
        _mark(axes, kept)
    if names:
        accuracy.legend(fontsize=8, loc="best")
    labels.legend(fontsize=8, loc="upper left")
    accuracy.set_title("red: drifts; violet: another champion", fontsize=9)
    return drawn


def _mark(axes: Axes, kept: Kept) -> None:
    for event in kept.events:
        if event.kind in MARKED:
            axes.axvline(event.number, color=MARKED[event.kind], linewidth=0.8, alpha=0.7)


def _label(name: str) -> str:
    """As matplotlib takes it: a dollar would begin a formula, an underscore hides a line."""
    return f" {shortened(name, 40)}".replace("$", r"\$")


def _floats(values: Sequence[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values])


def _percent(part: float, whole: float) -> str | None:
    return f"{100 * part / whole:.1f} %" if whole else None


def _per_million(number: int, records: int) -> str | None:
    return cell(1e6 * number / records) if records else None


def _money(price: float | None, prices: ReportConfig) -> str | None:
    return None if price is None else f"{price:.3g} {plain(prices.price_label)}"
