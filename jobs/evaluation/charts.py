"""Charts of an evaluation: accuracy against labels, accuracy under corruptions, an image's way through a stack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from jobs.evaluation.results import CLEAN, by_row, key_rank, of_measure
from simmatch.model import Stack, pooled

Floats = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Told apart by the colour-blind too; Okabe and Ito (2008), without the yellow that white swallows."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", "--", ":")

APART = 1.01
"""Ratio of the places on the axis of two rows at one budget."""

TICKS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 1.0)
"""Accuracies with a line across the chart."""

LEAST_ERROR = 1e-3
"""Added to the error, so that an accuracy of 1 has a place."""

BARS = 6
"""Rows in a chart of bars."""

CHANNELS = 16
"""Maps of a layer that are shown, `COLUMNS` in a line."""

COLUMNS = 8


def _label(row: str) -> str:
    """A row's name as matplotlib takes it: a dollar would begin a formula, an underscore hides a line."""
    text = row.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# -- labels ------------------------------------------------------------------------------------------------------------


def label_efficiency_figure(known: pd.DataFrame) -> Figure:
    """Means with standard deviations over seeds; the legend in the order in which lines end.

    Rows are drawn side by side at a budget, a little apart, so that error bars do not hide each other.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("function", functions=(_by_error, _from_error))
    accuracy = of_measure(known, "accuracy")
    rows, places = accuracy.index.unique("row"), _places(accuracy.index.unique("key"))
    for index, row in enumerate(rows):
        line = accuracy.xs(row, level="row")
        apart = APART ** (index - (len(rows) - 1) / 2)
        axes.errorbar(
            [places[budget] * apart for budget in line.index],
            line["mean"],
            yerr=line["std"],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=1.2,
            elinewidth=0.8,
        )
    _ticks(axes, places)
    axes.set_xlabel("labels per class (log scale; 'all' is one step further, whatever its number)")
    axes.set_ylabel("test accuracy (log scale of the error)")
    axes.set_title(f"Test accuracy against labels per class{_error_bar_words(accuracy)}", fontsize=10)
    axes.grid(alpha=0.3)
    ends = accuracy["mean"].groupby("row", sort=False).last()
    order = sorted(range(len(rows)), key=lambda index: -ends.iloc[index])
    if order:
        figure.legend(
            [axes.containers[index][0] for index in order],
            [_label(rows[index]) for index in order],
            loc="outside right upper",
            fontsize=9,
            handlelength=4,
            frameon=False,
        )
    return figure


def _ticks(axes: Axes, places: Mapping[str, float]) -> None:
    """A tick a budget, and those of `TICKS` that are in sight."""
    axes.set_xticks(list(places.values()), list(places))
    axes.minorticks_off()
    if places:
        axes.set_xlim(min(places.values()) / 1.5, max(places.values()) * 1.5)
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _by_error(accuracy: Floats) -> Floats:
    """−log₁₀ of the error: the best rows are as far from each other as the worst."""
    return -np.log10(np.maximum(1.0 + LEAST_ERROR - accuracy, LEAST_ERROR / 2))


def _from_error(place: Floats) -> Floats:
    return 1.0 + LEAST_ERROR - np.power(10.0, -place)


def _places(budgets: Iterable[str]) -> dict[str, float]:
    """Budget → place on the axis: its number; 'all', whose number a chart does not know, one step further."""
    places = {budget: key_rank(budget) for budget in sorted(budgets, key=key_rank)}
    numbers = [place for place in places.values() if place < math.inf]
    step = numbers[-1] / numbers[-2] if len(numbers) > 1 else 10.0
    beyond = numbers[-1] * step if numbers else 1.0
    return {budget: min(place, beyond) for budget, place in places.items()}


# -- corruptions -------------------------------------------------------------------------------------------------------


def corruption_figure(known: pd.DataFrame) -> Figure:
    """Clean images at the left, then every corruption; if there are many rows, those that `spread_out` takes."""
    corrupted = by_row(known, "corrupted")["mean"]
    shown = spread_out(corrupted)
    corruptions = of_measure(known, "corruptions")
    corruptions = corruptions[corruptions.index.get_level_values("row").isin(shown)]
    groups = sorted(corruptions.index.unique("key"), key=lambda name: name != CLEAN)
    figure = Figure(figsize=(max(7.0, 0.95 * len(groups)), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / max(len(shown), 1)
    for index, row in enumerate(shown):
        bars = corruptions.xs(row, level="row").reindex(groups)
        axes.bar(
            [group + (index - (len(shown) - 1) / 2) * width for group in range(len(groups))],
            bars["mean"],
            width,
            yerr=bars["std"],
            label=_label(row),
            color=COLOURS[index],
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(groups)), [name.replace("_", " ") for name in groups], rotation=30, ha="right")
    axes.set_xlim(-0.6, max(len(groups), 1) - 0.4)
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if CLEAN in groups:
        axes.axvline(0.5, color="0.6", linewidth=0.8)
    some = f"; {len(shown)} of {len(corrupted)} rows, from the least to the most robust"
    some = some if len(shown) < len(corrupted) else ""
    figure.suptitle(f"Test accuracy under corruption{_error_bar_words(corruptions)}{some}", fontsize=10)
    if shown:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def spread_out(corrupted: pd.Series) -> list[str]:
    """At most `BARS` rows, in their order: the first, and of the others the best, the worst and even ranks between.

    corrupted: mean accuracy under corruption, by row.
    """
    rows = list(corrupted.index)
    if len(rows) <= BARS:
        return rows
    ranked = list(corrupted.iloc[1:].sort_values(kind="stable").index)
    chosen = {rows[0], *(ranked[round(rank * (len(ranked) - 1) / (BARS - 2))] for rank in range(BARS - 1))}
    return [row for row in rows if row in chosen]


def _error_bar_words(drawn: pd.DataFrame) -> str:
    """What error bars are, if some are drawn."""
    return "; error bars: standard deviation over seeds" if drawn["std"].notna().any() else ""


# -- activity ----------------------------------------------------------------------------------------------------------


def activation_figure(stack: Stack, image: Tensor) -> Figure:
    """The image, then layer by layer the maps of the channels most active on it; a dense layer's code as bars.

    Raises
    ------
    ValueError
        No single image [C, H, W] of the stack's.
    """
    expected = [stack.source.in_channels, *stack.source.image_size]
    if list(image.shape) != expected:
        raise ValueError(f"image: expected [C, H, W] = {expected}, got {list(image.shape)}")
    activities = layer_activities(stack, image)
    heights = [
        1.9 if y[0].numel() == 1 else 0.7 + 1.05 * math.ceil(min(CHANNELS, len(y)) / COLUMNS) for y in activities
    ]
    figure = Figure(figsize=(11, sum(heights) + 0.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4), squeeze=False).flat
    _show_image(left.subplots(), image)
    parts = right.subfigures(len(activities), 1, height_ratios=heights, squeeze=False)
    for index, (part, y) in enumerate(zip(parts.flat, activities, strict=True)):
        channels, height, width = y.shape
        active = 100 * float((y > 0).double().mean())
        if height * width == 1:
            part.suptitle(f"layer {index}: {channels} channels, {active:.0f} % active", fontsize=9)
            _draw_code(part.subplots(), y.flatten())
        else:
            some = f"{CHANNELS} most active of " if channels > CHANNELS else ""
            size = f"{height} × {width} positions, {active:.0f} % active"
            part.suptitle(f"layer {index}: {some}{channels} channels, {size}", fontsize=9)
            _draw_maps(part, y)
    return figure


@torch.no_grad()
def layer_activities(stack: Stack, image: Tensor) -> list[Tensor]:
    """Label-free activities [K, H', W'] of every layer for an image [C, H, W], before pooling."""
    x = image.unsqueeze(0).to(stack.layer(0).feedforward)
    activities = []
    for index, config in enumerate(stack.config.layers):
        y = stack.layer(index)(x)
        activities.append(y[0].cpu().float())
        x = pooled(y, config)
    return activities


def most_active(y: Tensor) -> list[int]:
    """Channels of activities [K, H, W] by their mean, the largest first; at most `CHANNELS`."""
    order: list[int] = y.flatten(1).mean(dim=1).argsort(descending=True, stable=True).tolist()
    return order[:CHANNELS]


def _show_image(axes: Axes, image: Tensor) -> None:
    shown = image.detach().cpu().float()
    if len(shown) == 3:
        axes.imshow(rearrange(shown, "c h w -> h w c").clamp(0, 1).numpy())
    else:
        axes.imshow(shown.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"image, {image.shape[1]} × {image.shape[2]}", fontsize=9)


def _draw_maps(part: SubFigure, y: Tensor) -> None:
    """Tiles of one scale from 0, each named by its channel."""
    channels = most_active(y)
    top = float(y.amax()) or 1.0
    grid = part.subplots(math.ceil(len(channels) / COLUMNS), COLUMNS, squeeze=False)
    for axes in grid.flat[len(channels) :]:
        axes.set_axis_off()
    for axes, channel in zip(grid.flat, channels, strict=False):
        tile = axes.imshow(y[channel].numpy(), cmap="magma", vmin=0, vmax=top)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"channel {channel}", fontsize=7, pad=2)
    bar = part.colorbar(tile, ax=grid, pad=0.01, aspect=12)
    bar.set_label("activity", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_code(axes: Axes, y: Tensor) -> None:
    """One bar a channel."""
    axes.bar(range(len(y)), y.numpy(), width=1.0, color=COLOURS[0])
    axes.set_xlim(-0.5, len(y) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("channel", fontsize=8)
    axes.set_ylabel("activity", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", alpha=0.3)
