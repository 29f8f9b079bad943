"""Charts draw the estimates; maps of a stack are the activities of its layers."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from torch import Tensor

from jobs.evaluation.charts import (
    APART,
    activation_figure,
    corruption_figure,
    label_efficiency_figure,
    layer_activities,
    spread_out,
)
from jobs.evaluation.results import RowResult, by_row, estimates, of_measure
from jobs.reporting import save_figure
from simmatch.config import ModelConfig, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.model import InputConfig, Stack


def result(row: str, seed: int = 0, **fields) -> RowResult:
    return RowResult(
        row=row,
        seed=seed,
        settings="",
        features=1,
        parameters_trained=0,
        parameters_inference=0,
        operations=0,
        fit_seconds=0.0,
        images_per_second=1.0,
        **fields,
    )


def rows(count: int, seeds: int = 3) -> pd.DataFrame:
    """Rows of made-up accuracies; row i is the better the larger i, under corruption i · 7 mod 16 says how good."""
    budgets = ("10", "50", "100", "1000", "all")
    return estimates(
        [
            result(
                f"row {index}",
                seed,
                accuracy={budget: 0.5 + 0.07 * i + 0.005 * index + 0.01 * seed for i, budget in enumerate(budgets)},
                corruptions={"clean": 0.9, "fog": 0.5 + 0.02 * (index * 7 % 16), "shot_noise": 0.4 + 0.01 * seed},
            )
            for index in range(count)
            for seed in range(seeds)
        ]
    )


def lines_of(known: pd.DataFrame, measure: str) -> list[pd.DataFrame]:
    """The estimates of a measure, row by row."""
    return [line for _, line in of_measure(known, measure).groupby("row", sort=False)]


def spread(path: Path) -> float:
    """Standard deviation of a picture's pixels, in [0, 1]."""
    pixels = matplotlib.image.imread(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 50
    return float(pixels[..., :3].std())


def half_lengths(container: ErrorbarContainer) -> list[float]:
    """Of vertical error bars, those that are drawn."""
    [bars] = container[2]
    return [float(np.ptp(segment[:, 1])) / 2 for segment in bars.get_segments() if segment.size]


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 16])
def test_lines_are_the_estimates(count: int) -> None:
    known = rows(count)
    figure = label_efficiency_figure(known)
    [axes] = figure.axes
    assert len(axes.containers) == count
    places = np.array([10, 50, 100, 1000, 10_000])
    for container, line in zip(axes.containers, lines_of(known, "accuracy"), strict=True):
        x, y = container[0].get_data()
        assert list(y) == list(line["mean"])
        assert half_lengths(container) == pytest.approx(list(line["std"]))
        assert np.abs(np.log(x.astype(float) / places)).max() < 16 / 2 * math.log(APART) + 1e-9
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == list(places)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "50", "100", "1000", "all"]
    assert "labels per class" in axes.get_xlabel()
    assert "test accuracy" in axes.get_ylabel()
    assert axes.get_title()


def test_rows_can_be_told_apart_and_are_named_from_the_best_to_the_worst() -> None:
    figure = label_efficiency_figure(rows(16))
    [axes], [legend] = figure.axes, figure.legends
    lines = [container[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 16
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 16
    assert [text.get_text() for text in legend.get_texts()] == [f"row {index}" for index in reversed(range(16))]
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert colours == [line.get_color() for line in reversed(lines)]


def test_higher_is_better_and_all_is_in_sight() -> None:
    """An accuracy of 1, of 0, and a spread that reaches past 1 are drawn, the better the higher."""
    values = [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]
    known = estimates(
        [result("a", seed, accuracy={str(10**i): v for i, v in enumerate(values)}) for seed in range(2)]
        + [result("b", seed, accuracy={"1": 0.8 + 0.2 * seed}) for seed in range(2)]
    )
    figure = label_efficiency_figure(known)
    figure.draw_without_rendering()
    [axes] = figure.axes
    places = axes.transAxes.inverted().transform(axes.transData.transform(axes.containers[0][0].get_xydata()))
    assert np.all(np.diff(places[:, 1]) > 0.01)
    assert places.min() > 0.01
    assert places.max() < 0.99
    ticks = axes.get_yticks()
    assert [float(label.get_text()) for label in axes.get_yticklabels()] == list(ticks)
    assert {0.5, 0.9, 1.0} <= set(ticks)


def test_a_budget_that_a_row_lacks() -> None:
    """Its line goes past the budget; one seed has no error bar, a row without accuracies no line."""
    found = [
        result("a", accuracy={"10": 0.5, "20": 0.6, "all": 0.7}),
        result("b", 0, accuracy={"10": 0.4, "all": 0.8}),
        result("b", 1, accuracy={"10": 0.5}),
        result("c"),
    ]
    [axes] = label_efficiency_figure(estimates(found)).axes
    first, second = axes.containers
    assert list(second[0].get_ydata()) == [0.45, 0.8]
    assert half_lengths(first) == []
    assert half_lengths(second) == pytest.approx([0.1 / math.sqrt(2)])
    assert list(axes.get_xticks()) == [10, 20, 40]


@pytest.mark.parametrize(
    ("accuracy", "ticks"), [({"all": 0.5}, {"all": 1.0}), ({"5": 0.5, "all": 0.6}, {"5": 5.0, "all": 50.0}), ({}, {})]
)
def test_few_budgets_or_none(tmp_path: Path, accuracy: dict[str, float], ticks: dict[str, float]) -> None:
    known = estimates([result("a", accuracy=accuracy)])
    [axes] = label_efficiency_figure(known).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(ticks)
    assert list(axes.get_xticks()) == list(ticks.values())
    save_figure(label_efficiency_figure(known), tmp_path / "labels.png")
    assert spread(tmp_path / "labels.png") > 0.01


# -- corruptions -------------------------------------------------------------------------------------------------------


def bars(axes: Axes) -> list[BarContainer]:
    return [container for container in axes.containers if isinstance(container, BarContainer)]


def test_bars_are_the_estimates() -> None:
    """One bar a row in each group, beside each other around the group's tick, none over another."""
    known = rows(4)
    figure = corruption_figure(known)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "fog", "shot noise"]
    for container, line in zip(bars(axes), lines_of(known, "corruptions"), strict=True):
        assert [bar.get_height() for bar in container] == list(line["mean"])
        assert half_lengths(container.errorbar) == pytest.approx(list(line["std"]))
    for group in range(3):
        places = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in (each[group] for each in bars(axes))]
        assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(places))
        assert places[0][0] + places[-1][1] == pytest.approx(2 * group)
        assert group - 0.5 < places[0][0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"row {index}" for index in range(4)]
    assert axes.get_ylabel() == "test accuracy"
    assert figure.get_suptitle().startswith("Test accuracy under corruption")
    assert " of " not in figure.get_suptitle()


@pytest.mark.parametrize("seeds", [1, 3])
def test_error_bars_are_explained_where_there_are_any(seeds: int) -> None:
    some = rows(2, seeds)
    (axes,) = label_efficiency_figure(some).axes
    for title in (axes.get_title(), corruption_figure(some).get_suptitle()):
        assert title.endswith("; error bars: standard deviation over seeds") is (seeds > 1)


def test_clean_is_left_wherever_it_comes_and_may_be_missing() -> None:
    found = [result("a", corruptions={"fog": 0.5, "clean": 0.9}), result("b", corruptions={"shear": 0.4}), result("c")]
    [axes] = corruption_figure(estimates(found)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "fog", "shear"]
    heights = [[bar.get_height() for bar in container] for container in bars(axes)]
    assert heights == [
        pytest.approx([0.9, 0.5, math.nan], nan_ok=True),
        pytest.approx([math.nan] * 2 + [0.4], nan_ok=True),
    ]


def test_of_many_rows_the_first_and_even_ranks_of_the_others() -> None:
    """By fog, row i of 16 has rank 7 i mod 16; of ranks 1 to 15, the others', five are even: 1, 4 or 5, 8, …, 15."""
    shown = [int(row.split()[1]) for row in spread_out(by_row(rows(16), "corrupted")["mean"])]
    assert len(shown) == 6
    assert shown == sorted(shown)
    assert shown[0] == 0
    ranks = sorted(index * 7 % 16 for index in shown[1:])
    assert (ranks[0], ranks[2], ranks[4]) == (1, 8, 15)
    assert ranks[1] in (4, 5)
    assert ranks[3] in (11, 12)
    figure = corruption_figure(rows(16))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"row {index}" for index in shown]
    assert "6 of 16 rows" in figure.get_suptitle()
    assert spread_out(by_row(rows(6), "corrupted")["mean"]) == [f"row {index}" for index in range(6)]


# -- files -------------------------------------------------------------------------------------------------------------


def test_charts_are_pictures(tmp_path: Path) -> None:
    strange = estimates([result("_a $x^2$ (α = 3)", accuracy={"10": 0.5}, corruptions={"clean": 0.5, "fog": 0.1})])
    for name, known in {"many": rows(16), "strange": strange}.items():
        save_figure(label_efficiency_figure(known), tmp_path / f"{name}-labels.png")
        save_figure(corruption_figure(known), tmp_path / f"{name}-bars.png")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4
    assert all(spread(path) > 0.03 for path in tmp_path.iterdir())
    assert "a \\$x^2\\$" in label_efficiency_figure(strange).legends[0].get_texts()[0].get_text()


def test_nothing_was_corrupted(tmp_path: Path) -> None:
    save_figure(corruption_figure(estimates([result("a", accuracy={"all": 0.5})])), tmp_path / "bars.png")
    assert spread(tmp_path / "bars.png") > 0.01


# -- activity ----------------------------------------------------------------------------------------------------------


def make_stack(channels: int = 1, out_channels: int = 20, **first) -> Stack:
    layers = [
        {"out_channels": out_channels, "kernel_size": 3, "pool": 4, **first},
        {"out_channels": 7, "kernel_size": "full", "supervised": True},
    ]
    source = InputConfig(in_channels=channels, height=8, width=8, num_classes=10)
    return Stack(parse(ModelConfig, {"layers": layers}), source, seed=1).eval()


@pytest.fixture
def image(digits: Dataset) -> Tensor:
    """[1, 8, 8]."""
    return to_unit(digits.test_images[:1])[0].float()


def test_activities_are_those_of_the_model(image: Tensor) -> None:
    """The first layer by itself, the last as the stack's own forward has it."""
    stack = make_stack()
    first, last = layer_activities(stack, image)
    assert torch.equal(first, stack.layer(0)(image.unsqueeze(0))[0])
    assert torch.equal(last, stack(image.unsqueeze(0))[0])


def test_maps_of_the_most_active_channels(image: Tensor) -> None:
    stack = make_stack()
    figure = activation_figure(stack, image)
    picture, *others = figure.axes
    assert np.array_equal(picture.images[0].get_array(), image[0])
    activity, code = layer_activities(stack, image)
    means = {channel: sum(map(float, activity[channel].flatten())) for channel in range(20)}
    order = sorted(means, key=lambda channel: -means[channel])[:16]
    tiles = [axes for axes in others if axes.images]
    assert [axes.get_title() for axes in tiles] == [f"channel {channel}" for channel in order]
    for axes, channel in zip(tiles, order, strict=True):
        assert np.array_equal(axes.images[0].get_array(), activity[channel])
        assert axes.images[0].get_clim() == (0, float(activity.max()))
    [dense] = [axes for axes in others if axes.containers]
    assert [bar.get_height() for bar in dense.containers[0]] == pytest.approx(code.flatten().tolist())
    assert (dense.get_xlabel(), dense.get_ylabel()) == ("channel", "activity")
    share = round(100 * sum(bool(value > 0) for value in activity.flatten()) / activity.numel())
    titles = [part.get_suptitle() for part in figure.subfigs[1].subfigs]
    assert titles[0] == f"layer 0: 16 most active of 20 channels, 6 × 6 positions, {share} % active"
    assert titles[1].startswith("layer 1: 7 channels, ")


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 5), (3, 8), (2, 9)])
def test_images_of_any_channels_and_few_maps(channels: int, out_channels: int) -> None:
    stack = make_stack(channels, out_channels, normalize="contrast")
    image = torch.linspace(0, 1, channels * 64).reshape(channels, 8, 8)
    figure = activation_figure(stack, image)
    picture = figure.axes[0].images[0].get_array()
    assert np.allclose(picture, image.permute(1, 2, 0) if channels == 3 else image.mean(dim=0))
    assert sum(axes.get_title().startswith("channel") for axes in figure.axes) == out_channels


def test_a_stack_is_a_picture_and_so_is_a_silent_one(tmp_path: Path, image: Tensor) -> None:
    stack = make_stack(out_channels=4)
    save_figure(activation_figure(stack, image), tmp_path / "active.png")
    with torch.no_grad():
        stack.layer(0).feedforward.fill_(-1.0)
    save_figure(activation_figure(stack, image), tmp_path / "silent.png")
    assert spread(tmp_path / "active.png") > 0.05
    assert spread(tmp_path / "silent.png") > 0.05
    assert (tmp_path / "active.png").read_bytes() != (tmp_path / "silent.png").read_bytes()


def test_one_image_of_the_stacks_own_shape(image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"image: expected \[C, H, W\] = \[1, 8, 8\], got \[1, 1, 8, 8\]"):
        activation_figure(make_stack(), image.unsqueeze(0))
