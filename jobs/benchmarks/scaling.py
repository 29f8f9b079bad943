"""Shards against one device with the same threads: `python -m jobs.benchmark scaling`.

    one rank × T threads    against    G ranks × T/G threads, in every exchange mode

make the same update of the same layer, in turns, one rank with each of the solvers that the modes take. `ratio` is
that to one rank with the same solver, so that the work is the same: 1 says that splitting a layer over processes costs
nothing. `ratio_fastest` is that to the fastest of one rank's solvers: what splitting is worth to a user.

The layer has k = 5 and as many columns per image as the image has pixels: N = 784 B for B images of Fashion-MNIST.
Beside the ratio stand exchanges and bytes of one update, which are exact, and the share of time spent waiting.

The wider the layer and the larger the batch, the longer an update: `--update-seconds` cuts the batch to the images that
one rank can learn from in that time. Rows and figures say how many there were.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from jobs.benchmarks.cells import BEST_TARGET, Cell, alone, baseline, draw_map, draw_ratios
from jobs.benchmarks.problems import Recipe
from jobs.benchmarks.processes import Group, Host
from jobs.benchmarks.updates import BASELINE, affordable, compare, hold, modes, train
from jobs.reporting import Report
from simmatch.config import ConfigError, DataConfig
from simmatch.data.order import epoch_order
from simmatch.data.sources import load_dataset, to_unit

CHANNELS, BATCHES, UPDATE_SECONDS = (64, 128, 256, 512, 1024, 2048), (1, 8, 128), 4.0
QUICK_CHANNELS, QUICK_BATCHES, QUICK_UPDATE_SECONDS = (64, 256), (8,), 0.5

TRAIN_UPDATES, TRAIN_IMAGES, TRAIN_LOAD = 40, 16, 8192
"""Updates of the weights before anything is measured, and the images of each: as many as there are, or fewer so that
images × channels stay below the last."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark beside the common ones."""
    parser.add_argument("--data", default="fashion_mnist", metavar="NAME", help="data set (default: fashion_mnist)")
    parser.add_argument("--ranks", type=int, default=2, metavar="G", help="shards (default: 2)")
    parser.add_argument("--channels", type=int, nargs="+", metavar="K", help=f"default: {listed(CHANNELS)}")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help=f"images; default: {listed(BATCHES)}")
    parser.add_argument("--tolerance", type=float, default=1e-2, metavar="R", help="residual to reach (default: 0.01)")
    parser.add_argument(
        "--update-seconds",
        type=float,
        metavar="S",
        help=f"cut batches to what one rank learns in S seconds (default: {UPDATE_SECONDS:g}, quick: "
        f"{QUICK_UPDATE_SECONDS:g})",
    )


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure every cell, then draw the map.

    Raises
    ------
    ConfigError
        Options out of range.
    """
    threads = _checked_threads(options)
    channels = options.channels or (QUICK_CHANNELS if options.quick else CHANNELS)
    batches = sorted(options.batches or (QUICK_BATCHES if options.quick else BATCHES))
    images = sample(options.data, max(batches), options.seed)
    one = Group([Host()], threads=threads)
    many = Group([Host()] * options.ranks, threads=threads // options.ranks)
    cells: list[Cell] = []
    with one, many, report.progress(len(channels) * (len(batches) + 1)) as step:
        for count in channels:
            for cell in _row_of_cells((one, many), count, batches, images, options, step):
                cells.append(cell)
                _tell(cell, threads, options, report)
    _table(cells, options.tolerance, report)
    with report.figure("map", width=2.0 + 2.2 * len(batches), height=1.5 + 0.7 * len(channels)) as figure:
        draw_map(figure, cells)
    with report.figure("ratio", width=2.0 + 3.2 * len(batches), height=4.0) as figure:
        draw_ratios(figure, cells, modes(options.tolerance))


def sample(name: str, count: int, seed: int) -> Tensor:
    """The first training images in the order of the first epoch: [count, C, H, W] in [0, 1]."""
    stored = load_dataset(DataConfig(name=name)).train_images
    if count > len(stored):
        raise ConfigError(f"--batches: expected at most {len(stored)} images of {name}, got {count}")
    return to_unit(stored[epoch_order(len(stored), seed=seed, epoch=0, images=count)])


def trained(group: Group, data: str, channels: int, seed: int) -> dict[str, Tensor]:
    """Weights of a layer that has learnt a little, see `jobs.benchmarks.problems`; every rank learns them all."""
    batch = max(1, min(TRAIN_IMAGES, TRAIN_LOAD // channels))
    recipe = Recipe(data, channels, TRAIN_UPDATES * batch, batch, columns=0, seed=seed)
    weights: dict[str, Tensor] = group.ask(train, recipe, sample(data, recipe.images, seed))[0]
    return weights


def _checked_threads(options: argparse.Namespace) -> int:
    """Threads of one rank, which the shards divide among them."""
    for name, values in {"--channels": options.channels or [1], "--batches": options.batches or [1]}.items():
        if min(values) < 1:
            raise ConfigError(f"{name}: expected integers of at least 1, got {listed(values)}")
    if options.ranks < 2:
        raise ConfigError(f"--ranks: expected at least 2, got {options.ranks}")
    if options.channels and min(options.channels) < options.ranks:
        raise ConfigError(f"--channels: expected at least {options.ranks}, one per rank, got {min(options.channels)}")
    if options.update_seconds is not None and not options.update_seconds > 0:
        raise ConfigError(f"--update-seconds: expected a positive number, got {options.update_seconds:g}")
    modes(options.tolerance)
    threads: int = options.threads or options.ranks
    if threads % options.ranks:
        raise ConfigError(f"--threads: expected a multiple of {options.ranks} for so many ranks, got {threads}")
    return threads


def _row_of_cells(
    sides: tuple[Group, Group],
    channels: int,
    batches: list[int],
    images: Tensor,
    options: argparse.Namespace,
    step: Callable[[str], None],
) -> Iterator[Cell]:
    """All batches of one width, one rank against many. A batch that is cut to one already measured is left out."""
    one, many = sides
    configs = modes(options.tolerance)
    lone = {alone(found.solver): found.model_copy(update={"exchange": BASELINE}) for found in configs.values()}
    step(f"K = {channels}: learning weights")
    weights = trained(one, options.data, channels, options.seed)
    for group in sides:
        group.ask(hold, weights, images)
    limit_s = options.update_seconds or (QUICK_UPDATE_SECONDS if options.quick else UPDATE_SECONDS)
    most = affordable(one, configs[BASELINE], seed=options.seed, limit_s=limit_s)
    columns, before = images.shape[2] * images.shape[3], 0
    for batch in batches:
        count = min(batch, most)
        step(f"K = {channels}, {batch} images" + (f", cut to {count}" if count < batch else ""))
        if count == before:
            continue
        before = count
        ways = {way: (one, config) for way, config in lone.items()}
        ways |= {mode: (many, config) for mode, config in configs.items()}
        found = compare(
            ways, batch=count, seed=options.seed, rounds=options.rounds, min_s=0.05 if options.quick else 0.3
        )
        yield Cell(channels, batch, count, count * columns, found)


# ------------------------------------------------------------------------------------------- what is told


def _tell(cell: Cell, threads: int, options: argparse.Namespace, report: Report) -> None:
    """A row for every way, and one for the best of the modes."""
    where = {
        "channels": cell.channels,
        "batch": cell.batch,
        "images": cell.images,
        "columns": cell.columns,
        "tolerance": options.tolerance,
    }
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
            target=cell.target(way),
            ratio_fastest=cell.worth(way),
            **cell.compared.fields(way, same),
        )
    best = cell.worth(cell.best)
    report.row(
        kind="best",
        **where,
        way=cell.best,
        fastest=cell.fastest,
        ratio_fastest=best,
        target=BEST_TARGET,
        reached=best >= BEST_TARGET,
    )


def _table(cells: list[Cell], tolerance: float, report: Report) -> None:
    rows: list[list[Any]] = []
    configs = modes(tolerance)
    for cell in cells:
        for way in cell.compared.candidates:
            found = cell.compared.fields(way, baseline(way, configs))
            ratios = [found["seconds"], found["ratio"], cell.target(way), cell.worth(way)]
            counts = [found[name] for name in ("exchanges", "bytes", "waiting")]
            rows.append([f"{cell.channels} · {_images(cell)} · {way}", *ratios, *counts])
    columns = ["K · images · way", "s/update", "ratio", "target", "to fastest", "exchanges", "bytes", "waiting"]
    report.table("one update: shards against one rank with the same threads", columns, rows)


def _images(cell: Cell) -> str:
    return f"{cell.images}" if cell.images == cell.batch else f"{cell.images} (of {cell.batch})"


def listed(values: Sequence[float]) -> str:
    """Numbers for a message: `64 128`."""
    return " ".join(f"{value:g}" for value in values)
