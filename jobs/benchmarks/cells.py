"""The map of the exchange modes: its cells, and the figures drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jobs.benchmarks.updates import BASELINE, Compared, exchanges
from simmatch.config import DynamicsConfig

TARGETS = {512: 0.75, 1024: 0.85}
"""K → ratio that `every_iteration` should reach."""

BEST_TARGET = 0.95
"""Ratio that the best mode of a cell should reach."""


@dataclass(frozen=True)
class Cell:
    """One square of the map: `batch` images were asked for, `images` measured."""

    channels: int
    batch: int
    images: int
    columns: int
    compared: Compared

    @property
    def fastest(self) -> str:
        """The fastest way of one rank."""
        lone = [way for way in self.compared.timings.seconds if way not in exchanges()]
        return min(lone, key=lambda way: self.compared.timings.spread(way).median)

    def worth(self, mode: str) -> float:
        """Seconds of one rank's fastest way over seconds of a mode."""
        return self.compared.timings.speedup(mode, self.fastest).median

    @property
    def best(self) -> str:
        """The mode that is worth most."""
        return max(exchanges(), key=self.worth)

    def target(self, mode: str) -> float | None:
        """The ratio asked of a mode at this width, if any."""
        return TARGETS.get(self.channels) if mode == BASELINE else None


def alone(solver: str) -> str:
    """Name of one rank's way with a solver."""
    return f"one rank, {solver}"


def baseline(way: str, configs: Mapping[str, DynamicsConfig]) -> str:
    """One rank's way with the solver of a mode; of one rank's ways, itself."""
    return alone(configs[way].solver) if way in configs else way


def draw_map(figure: Figure, cells: list[Cell]) -> None:
    """Which mode wins where: K × batch, colour for the winner, its ratio as text."""
    modes = exchanges()
    widths, batches = sorted({cell.channels for cell in cells}), sorted({cell.batch for cell in cells})
    winners = np.full((len(widths), len(batches)), np.nan)
    axes = figure.subplots()
    for cell in cells:
        row, column = widths.index(cell.channels), batches.index(cell.batch)
        winners[row, column] = modes.index(cell.best)
        text = f"{cell.worth(cell.best):.2f}\n{cell.best}"
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
