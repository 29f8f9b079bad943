"""Two hosts on a slow link: `python -m jobs.benchmark network`.

Two ranks in network namespaces of their own (`jobs.benchmarks.links`) make the same learning update of the same layer,
in turns in every exchange mode and number format, over a link that is first unlimited and then limited. All ways reach
the same residual; the ratio is that to the plain one, a float32 exchange at every iteration of the accelerated solver.

Beside the seconds stands the time that the bytes of one update take at the link's rate, `wire_s`: the floor of any way
that moves so many. The limit is checked by a plain TCP transfer in the same namespaces.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jobs.benchmarks import sweep
from jobs.benchmarks.links import Link, measure_link
from jobs.benchmarks.namespaces import exits_on_sigterm
from jobs.benchmarks.processes import RankGroup
from jobs.benchmarks.sweep import Cell, Sizes
from jobs.benchmarks.updates import BASELINE, Comparison, keep_inputs, modes, sample, trained
from jobs.options import amount
from jobs.reporting import Report
from simmatch.config import ConfigError, DynamicsConfig

FULL, QUICK = Sizes((256,), (8, 128), update_seconds=15.0), Sizes((128,), (8,), update_seconds=0.3)

RATES = (1000.0, 200.0)
"""Limits of the link in Mbit/s."""

PLAIN = f"{BASELINE}, float32"
"""Name of the way that the others are compared with."""

SHORT, SHORTENED = "bfloat16", ("every_iteration", "block")
"""Number format of half the bytes, and the modes that can exchange activities in it."""

TARGET = 3.0
"""Times that the best way should be faster than the plain one on a limited link."""

TRANSFER_S, TRANSFER_BYTES = 0.5, 1 << 28
"""How long the plain transfer takes on a limited link, and its size on the unlimited one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones; `--threads` is per rank, 1 by default."""
    sweep.add_arguments(parser, FULL, QUICK, "float32 exchange")
    parser.add_argument(
        "--rates", type=amount, nargs="+", default=RATES, metavar="R",
        help="limits in Mbit/s, one run each (default: 1000 200)",
    )  # fmt: skip
    parser.add_argument(
        "--delay", type=amount, default=0.0, metavar="MS",
        help="delay of the link in each direction, in milliseconds; needs netem (default: 0)",
    )  # fmt: skip


@dataclass(frozen=True)
class LinkSpeed:
    """A link: nominal bits per second (None: unlimited), and what `measure_link` measured."""

    rate: float | None
    measured: list[float]
    exchange_s: float

    @property
    def name(self) -> str:
        return "unlimited" if self.rate is None else f"{self.rate / 1e6:g} Mbit/s"


@dataclass(frozen=True)
class LinkResult:
    """All ways to make one update over one link."""

    speed: LinkSpeed
    cell: Cell

    @property
    def compared(self) -> Comparison:
        return self.cell.compared

    def fields(self, way: str) -> dict[str, Any]:
        """A way's part of a row; `wire_s`: what the busier direction carries, in seconds at the nominal rate."""
        values = self.compared.fields(way, PLAIN)
        rate = self.speed.rate
        return values | {"wire_s": None if rate is None else max(values["bytes_per_rank"]) * 8 / rate}

    @property
    def best(self) -> str:
        """The way with the greatest ratio."""
        return max(self.compared.candidates, key=lambda way: self.compared.timings.speedup(way, PLAIN).median)


def ways(tolerance: float) -> dict[str, DynamicsConfig]:
    """The plain way first, then every other mode, and the short format of those that have one."""
    others = modes(tolerance)
    plain = others.pop(BASELINE).model_copy(update={"solver": "accelerated", "exchange_dtype": None})
    shorter = {
        f"{mode}, {SHORT}": config.model_copy(update={"exchange_dtype": SHORT})
        for mode, config in {BASELINE: plain, **others}.items()
        if mode in SHORTENED
    }
    return {PLAIN: plain} | others | shorter


def run(options: argparse.Namespace, report: Report) -> None:
    """Create the two hosts, measure every way over every link, remove the hosts.

    Raises
    ------
    ConfigError
        Options out of range.
    MissingError
        Network namespaces cannot be made here.
    """
    if min(options.rates) < 1:
        raise ConfigError(f"--rates: expected at least 1 Mbit/s, got {min(options.rates):g}")
    if not 0 <= options.delay < 1e4:
        raise ConfigError(f"--delay: expected milliseconds from 0 to 9999, got {options.delay:g}")
    sizes = sweep.sizes_of(options, FULL, QUICK, ranks=2)
    rates = [None, *(megabits * 1e6 for megabits in options.rates)]
    images = sample(options.data, max(sizes.batches), options.seed)
    results: list[LinkResult] = []
    steps = len(sizes.channels) * (1 + len(rates) * len(sizes.batches))
    with (
        exits_on_sigterm(),
        Link() as link,
        RankGroup(link.hosts, threads=options.threads or 1) as group,
        report.progress(steps) as step,
    ):
        weights = {}
        for count in sizes.channels:
            step(f"K = {count}: learning weights")
            weights[count] = trained(group, options.data, count, options.seed)
        for rate in rates:
            link.limit(rate, delay_ms=options.delay)
            size = TRANSFER_BYTES if rate is None else int(rate / 8 * TRANSFER_S)
            speed = LinkSpeed(rate, *measure_link(group, size))
            report.row(
                kind="link", link=speed.name, delay_ms=options.delay, rate_bits_per_s=rate,
                measured_bits_per_s=speed.measured, exchange_s=speed.exchange_s,
            )  # fmt: skip
            for count in sizes.channels:
                group.ask(keep_inputs, weights[count], images)
                chosen = {way: (group, config) for way, config in ways(options.tolerance).items()}
                shape = count, images.shape[2] * images.shape[3]
                for cell in sweep.cells(chosen, PLAIN, shape, sizes, options, step, where=f"{speed.name}: "):
                    results.append(LinkResult(speed, cell))
                    _write_rows(results[-1], options, report)
    _table(results, report)
    with report.figure("network", width=3.0 + 1.2 * len(ways(1e-2)), height=1.0 + 2.6 * len(results)) as figure:
        draw(figure, results)


# -- rows, tables, figures ---------------------------------------------------------------------------------------------


def _write_rows(result: LinkResult, options: argparse.Namespace, report: Report) -> None:
    """A row for every way, and one for the best of them."""
    where = {
        "link": result.speed.name,
        "rate_bits_per_s": result.speed.rate,
        **result.cell.fields(),
        "tolerance": options.tolerance,
    }
    for way in result.compared.candidates:
        report.row(
            kind="update", **where, way=way, ranks=2, threads_per_rank=options.threads or 1, **result.fields(way)
        )
    ratio = result.compared.timings.speedup(result.best, PLAIN).median
    target = None if result.speed.rate is None else TARGET
    reached = None if target is None else ratio >= target
    report.row(kind="best", **where, way=result.best, ratio=ratio, target=target, reached=reached)


def _table(results: list[LinkResult], report: Report) -> None:
    for result in results:
        rows = []
        for way in result.compared.candidates:
            values = result.fields(way)
            rows.append(
                [way, *(values[name] for name in ("seconds", "wire_s", "ratio", "exchanges", "bytes", "waiting"))]
            )
        cell = result.cell
        images = f"{cell.images} images" + (f" (cut from {cell.batch})" if cell.images < cell.batch else "")
        measured = " and ".join(f"{rate / 1e6:,.0f}" for rate in result.speed.measured)
        title = f"{result.speed.name} (a plain transfer: {measured} Mbit/s) · K = {cell.channels} · {images}"
        report.table(title, ["way", "s/update", "s on the wire", "ratio", "exchanges", "bytes", "waiting"], rows)


def draw(figure: Figure, results: list[LinkResult]) -> None:
    """Seconds per update, a panel per link and batch; black marks: what the bytes alone take at the link's rate."""
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        names = list(result.compared.candidates)
        seconds = [result.compared.timings.spread(way).median for way in names]
        places = np.arange(len(names))
        axes.bar(places, seconds, color="#9ecae1")
        for place, way, taken in zip(places, names, seconds, strict=True):
            values = result.fields(way)
            axes.text(place, taken, f"{values['ratio']:.2f}×", ha="center", va="bottom", fontsize=8)
            if values["wire_s"] is not None:
                axes.plot([place - 0.4, place + 0.4], [values["wire_s"]] * 2, color="black")
        axes.set_xticks(places, [way.replace(", ", "\n") for way in names], fontsize=8)
        axes.set_ylabel("seconds per update")
        axes.margins(y=0.15)
        axes.set_title(f"{result.speed.name}, K = {result.cell.channels}, {result.cell.images} images", fontsize=9)
