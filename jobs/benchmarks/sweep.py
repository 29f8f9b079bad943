"""What the sharded benchmarks go through: every width, with ever larger batches, within a limit of time.

A batch is cut to the images from which one way to make the update, the baseline, learns in `--update-seconds`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from jobs.benchmarks.processes import RankGroup
from jobs.benchmarks.updates import Comparison, compare, images_within, modes
from jobs.options import add_counts, amount
from simmatch.config import ConfigError, DynamicsConfig


@dataclass(frozen=True)
class Sizes:
    """Layer widths, images per update in ascending order, and the longest update of the baseline."""

    channels: tuple[int, ...]
    batches: tuple[int, ...]
    update_seconds: float


@dataclass(frozen=True)
class Cell:
    """All ways to make one update: `batch` images were asked for, `images` measured."""

    channels: int
    batch: int
    images: int
    columns: int
    compared: Comparison

    def fields(self) -> dict[str, int]:
        """The sizes, for a row."""
        return {name: getattr(self, name) for name in ("channels", "batch", "images", "columns")}


def add_arguments(parser: argparse.ArgumentParser, full: Sizes, quick: Sizes, baseline: str) -> None:
    """Options of both benchmarks in addition to the common ones; `baseline`: which way limits the images."""
    parser.add_argument("--data", default="fashion_mnist", metavar="NAME", help="data set (default: fashion_mnist)")
    add_counts(parser, "channels", "K", f"layer widths (default: {_joined(full.channels)})", several=True)
    add_counts(parser, "batches", "B", f"images per update (default: {_joined(full.batches)})", several=True)
    parser.add_argument(
        "--tolerance", type=amount, default=1e-2, metavar="R", help="residual of the dynamics (default: 0.01)"
    )
    seconds = f"default: {full.update_seconds:g}, quick: {quick.update_seconds:g}"
    parser.add_argument(
        "--update-seconds",
        type=amount,
        metavar="S",
        help=f"reduce batches to what {baseline} learns from in S seconds ({seconds})",
    )


def sizes_of(options: argparse.Namespace, full: Sizes, quick: Sizes, ranks: int) -> Sizes:
    """Sizes from the options, checked.

    Raises
    ------
    ConfigError
        Options out of range.
    """
    if options.channels and min(options.channels) < ranks:
        raise ConfigError(f"--channels: expected at least {ranks}, one per rank, got {min(options.channels)}")
    if options.update_seconds is not None and not options.update_seconds > 0:
        raise ConfigError(f"--update-seconds: expected a positive number, got {options.update_seconds:g}")
    modes(options.tolerance)
    default = quick if options.quick else full
    return Sizes(
        tuple(options.channels or default.channels),
        tuple(sorted(options.batches or default.batches)),
        options.update_seconds or default.update_seconds,
    )


def cells(
    ways: Mapping[str, tuple[RankGroup, DynamicsConfig]],
    baseline: str,
    shape: tuple[int, int],
    sizes: Sizes,
    options: argparse.Namespace,
    step: Callable[[str], None],
    *,
    where: str = "",
    min_s: float = 0.0,
) -> Iterator[Cell]:
    """Every batch of one width; one that is cut to a batch already measured is left out.

    Parameters
    ----------
    ways: their groups hold weights and images already, see `jobs.benchmarks.updates.keep_inputs`.
    baseline: the way that limits the images.
    shape: channels of the layer, and columns of an image.
    where: what `step` shows first.
    min_s: least time of a way in a round.
    """
    channels, columns = shape
    most = images_within(*ways[baseline], seed=options.seed, limit_s=sizes.update_seconds)
    before = 0
    for batch in sizes.batches:
        images = min(batch, most)
        step(f"{where}K = {channels}, {batch} images" + (f", cut to {images}" if images < batch else ""))
        if images > before:
            compared = compare(ways, batch=images, seed=options.seed, rounds=options.rounds, min_s=min_s)
            yield Cell(channels, batch, images, images * columns, compared)
        before = images


def _joined(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
