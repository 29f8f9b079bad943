"""Shards against one device with the same threads: `python -m jobs.benchmark scaling`.

    one rank × T threads    against    G ranks × T/G threads, in every exchange mode

make the same update of the same layer, in turns, one rank with each of the solvers that the modes take. `ratio` is
that to one rank with the same solver, so that the work is the same: 1 says that splitting a layer over processes costs
nothing. `ratio_fastest` is that to the fastest of one rank's solvers: what splitting is worth to a user.

The layer has k = 5 and as many columns per image as the image has pixels: N = 784 B for B images of Fashion-MNIST.
Beside the ratio stand exchanges and bytes of one update, which are exact, and the share of time spent waiting.

`--axes` measures the other axes of a mesh instead: replicas of a layer, and stages of a stack (`jobs.benchmarks.axes`).

The wider the layer and the larger the batch, the longer an update: `--update-seconds` cuts the batch to the images that
one rank can learn from in that time. Rows and figures say how many there were.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from jobs.benchmarks import axes as other_axes
from jobs.benchmarks import sweep
from jobs.benchmarks.processes import Host, RankGroup
from jobs.benchmarks.sweep import Cell, Sizes
from jobs.benchmarks.updates import BASELINE, exchanges, keep_inputs, modes, sample, trained
from jobs.options import at_least
from jobs.reporting import Report
from simmatch.config import ConfigError, DynamicsConfig

FULL = Sizes((64, 128, 256, 512, 1024, 2048), (1, 8, 128), update_seconds=4.0)
QUICK = Sizes((64, 256), (8,), update_seconds=0.5)

TARGETS = {512: 0.75, 1024: 0.85}
"""K → ratio that `every_iteration` should reach."""

BEST_TARGET = 0.95
"""Ratio that the best mode of a cell should reach."""


def fastest(cell: Cell) -> str:
    """The fastest way of one rank."""
    lone = [way for way in cell.compared.timings.seconds if way not in exchanges()]
    return min(lone, key=lambda way: cell.compared.timings.spread(way).median)


def worth(cell: Cell, way: str) -> float:
    """Seconds of one rank's fastest way over seconds of this one."""
    return cell.compared.timings.speedup(way, fastest(cell)).median


def best(cell: Cell) -> str:
    """The mode that is worth most."""
    return max(exchanges(), key=lambda mode: worth(cell, mode))


def target(cell: Cell, way: str) -> float | None:
    """The ratio asked of a way at this width, if any."""
    return TARGETS.get(cell.channels) if way == BASELINE else None


def alone(solver: str) -> str:
    """Name of one rank's way with a solver."""
    return f"one rank, {solver}"


def baseline(way: str, configs: Mapping[str, DynamicsConfig]) -> str:
    """One rank's way with the solver of a mode; of one rank's ways, itself."""
    return alone(configs[way].solver) if way in configs else way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    parser.add_argument("--ranks", type=at_least(2), default=2, metavar="G", help="number of shards (default: 2)")
    parser.add_argument(
        "--axes", action="store_true", help="replicas of a layer and stages of a stack, two ranks of one thread each"
    )
    sweep.add_arguments(parser, FULL, QUICK, "one rank")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure every cell, then draw the map.

    Raises
    ------
    ConfigError
        Options out of range.
    """
    if options.axes:
        other_axes.run(options, report)
        return
    sizes = sweep.sizes_of(options, FULL, QUICK, options.ranks)
    threads: int = options.threads or options.ranks
    if threads % options.ranks:
        raise ConfigError(f"--threads: expected a multiple of {options.ranks} for so many ranks, got {threads}")
    images = sample(options.data, max(sizes.batches), options.seed)
    one = RankGroup([Host()], threads=threads)
    many = RankGroup([Host()] * options.ranks, threads=threads // options.ranks)
    cells: list[Cell] = []
    with one, many, report.progress(len(sizes.channels) * (len(sizes.batches) + 1)) as step:
        for channels in sizes.channels:
            for cell in _row_of_cells((one, many), channels, sizes, images, options, step):
                cells.append(cell)
                _write_rows(cell, threads, options, report)
    _table(cells, options.tolerance, report)
    with report.figure("map", width=2.0 + 2.2 * len(sizes.batches), height=1.5 + 0.7 * len(sizes.channels)) as figure:
        draw_map(figure, cells)
    with report.figure("ratio", width=2.0 + 3.2 * len(sizes.batches), height=4.0) as figure:
        draw_ratios(figure, cells, modes(options.tolerance))


def _row_of_cells(
    sides: tuple[RankGroup, RankGroup],
    channels: int,
    sizes: Sizes,
    images: Tensor,
    options: argparse.Namespace,
    step: Callable[[str], None],
) -> Iterator[Cell]:
    """All batches of one width, one rank against many."""
    one, many = sides
    configs = modes(options.tolerance)
    ways = {
        alone(config.solver): (one, config.model_copy(update={"exchange": BASELINE})) for config in configs.values()
    }
    ways |= {mode: (many, config) for mode, config in configs.items()}
    step(f"K = {channels}: learning weights")
    weights = trained(one, options.data, channels, options.seed)
    for group in sides:
        group.ask(keep_inputs, weights, images)
    shape = channels, images.shape[2] * images.shape[3]
    limiting = alone(configs[BASELINE].solver)
    yield from sweep.cells(ways, limiting, shape, sizes, options, step, min_s=0.05 if options.quick else 0.3)


# -- rows, tables, figures ---------------------------------------------------------------------------------------------


def _write_rows(cell: Cell, threads: int, options: argparse.Namespace, report: Report) -> None:
    """A row for every way, and one for the best of the modes."""
    where = cell.fields() | {"tolerance": options.tolerance}
    configs = modes(options.tolerance)
    for way in cell.compared.candidates:
        ranks = options.ranks if way in configs else 1
        same = baseline(way, configs)
        report.row(
            kind="update",
            **where,
            way=way,
            baseline=same,
            ranks=ranks,
            threads_per_rank=threads // ranks,
            target=target(cell, way),
            ratio_fastest=worth(cell, way),
            **cell.compared.fields(way, same),
        )
    ratio = worth(cell, best(cell))
    report.row(
        kind="best",
        **where,
        way=best(cell),
        fastest=fastest(cell),
        ratio_fastest=ratio,
        target=BEST_TARGET,
        reached=ratio >= BEST_TARGET,
    )


def _table(cells: list[Cell], tolerance: float, report: Report) -> None:
    rows: list[list[Any]] = []
    configs = modes(tolerance)
    for cell in cells:
        for way in cell.compared.candidates:
            values = cell.compared.fields(way, baseline(way, configs))
            ratios = [values["seconds"], values["ratio"], target(cell, way), worth(cell, way)]
            counts = [values[name] for name in ("exchanges", "bytes", "waiting")]
            rows.append([f"{cell.channels} · {_images(cell)} · {way}", *ratios, *counts])
    columns = ["K · images · way", "s/update", "ratio", "target", "to fastest", "exchanges", "bytes", "waiting"]
    report.table("one update: shards against one rank with the same threads", columns, rows)


def _images(cell: Cell) -> str:
    return f"{cell.images}" if cell.images == cell.batch else f"{cell.images} (of {cell.batch})"


def draw_map(figure: Figure, cells: list[Cell]) -> None:
    """Which mode wins where: K × batch, colour for the winner, its ratio as text."""
    modes = exchanges()
    widths, batches = sorted({cell.channels for cell in cells}), sorted({cell.batch for cell in cells})
    winners = np.full((len(widths), len(batches)), np.nan)
    axes = figure.subplots()
    for cell in cells:
        row, column = widths.index(cell.channels), batches.index(cell.batch)
        winners[row, column] = modes.index(best(cell))
        text = f"{worth(cell, best(cell)):.2f}\n{best(cell)}"
        if cell.images < cell.batch:
            text += f"\nat {cell.images} of them"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    colours = ListedColormap(["#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc", "#d9d9d9"][: len(modes)])
    axes.imshow(winners, cmap=colours, vmin=-0.5, vmax=len(modes) - 0.5, aspect="auto", origin="lower")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_yticks(range(len(widths)), [str(width) for width in widths])
    axes.set_xlabel("images per update")
    axes.set_ylabel("channels K")
    axes.set_title("fastest exchange mode\nspeed relative to one rank's fastest way", fontsize=9)


def draw_ratios(figure: Figure, cells: list[Cell], configs: Mapping[str, DynamicsConfig]) -> None:
    """Speed relative to one rank with the same solver against K: a panel per batch, a line per mode, bars from the
    least round to the greatest."""
    batches = sorted({cell.batch for cell in cells})
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        chosen = sorted((cell for cell in cells if cell.batch == batch), key=lambda cell: cell.channels)
        widths = [cell.channels for cell in chosen]
        for mode in exchanges():
            spreads = [cell.compared.timings.speedup(mode, baseline(mode, configs)) for cell in chosen]
            middle = [spread.median for spread in spreads]
            below = [spread.median - spread.min for spread in spreads]
            above = [spread.max - spread.median for spread in spreads]
            axes.errorbar(widths, middle, yerr=[below, above], marker="o", capsize=2, label=mode)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.axhline(BEST_TARGET, color="grey", linestyle=":", linewidth=0.8)
        for width, target in TARGETS.items():
            if width in widths:
                axes.plot([width], [target], marker="_", markersize=18, color="grey")
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_title(f"{batch} images per update", fontsize=9)
        axes.set_xlabel("channels K")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("speed relative to one rank, same solver")
    panels[0].legend(fontsize=8)
