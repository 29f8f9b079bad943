"""Figures are written, have their panels, and show something."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import jobs.figures
from jobs.figures import PANELS, filters, input_filters, preferred_images, training_curves
from simmatch.config import ModelConfig, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.model import InputConfig, Stack


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were made."""
    figures: list[Figure] = []

    def make(*args, **options) -> Figure:
        figures.append(Figure(*args, **options))
        return figures[-1]

    monkeypatch.setattr(jobs.figures, "Figure", make)
    return figures


def spread(path: Path) -> float:
    """Standard deviation of a picture's pixels, in [0, 1]."""
    pixels = matplotlib.image.imread(path)
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 50
    return float(pixels[..., :3].std())


def make_stack(channels: int = 1, out_channels: int = 10, **first) -> Stack:
    layers = [
        {"out_channels": out_channels, "kernel_size": 3, "pool": 4, **first},
        {"out_channels": 7, "kernel_size": "full", "supervised": True},
    ]
    source = InputConfig(in_channels=channels, height=8, width=8, num_classes=10)
    return Stack(parse(ModelConfig, {"layers": layers}), source, seed=1).eval()


def curve(steps: range, level: float) -> list[tuple[int, dict[str, float]]]:
    return [(step, dict.fromkeys(PANELS, level / step) | {"unseen": 1.0}) for step in steps]


def test_training_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {1: curve(range(5, 90, 5), 2.0), 0: curve(range(5, 30, 5), 1.0)}
    training_curves(curves, tmp_path / "curves.png")
    assert spread(tmp_path / "curves.png") > 0.05
    [figure] = drawn
    assert [axes.get_title() for axes in figure.axes] == list(PANELS.values())
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["layer 0", "layer 1"]
        for line, level, last in zip(axes.lines, (1.0, 2.0), (25, 85), strict=True):
            steps, values = line.get_data()
            assert steps[-1] == last
            assert np.allclose(values, level / np.array(steps))
    assert [axes.get_yscale() for axes in figure.axes].count("log") == 1


@pytest.mark.parametrize("curves", [{}, {0: []}, {0: [(5, dict.fromkeys(PANELS, 0.0))]}])
def test_curves_of_little_or_nothing(tmp_path: Path, curves: jobs.figures.Curves) -> None:
    """A run that continues at its very end has recorded nothing; a residual may be 0 on the logarithmic axis."""
    training_curves(curves, tmp_path / "curves.png")
    assert spread(tmp_path / "curves.png") > 0.01


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 10), (3, 10), (2, 1), (1, 70)])
def test_filters_of_the_first_layer(tmp_path: Path, drawn: list[Figure], channels: int, out_channels: int) -> None:
    stack = make_stack(channels, out_channels)
    filters(stack, 0, torch.zeros(1, channels, 8, 8), tmp_path / "filters.png")
    assert spread(tmp_path / "filters.png") > 0.05
    [figure] = drawn
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == min(out_channels, 64)
    title = figure.get_suptitle()
    assert title == "layer 0: feedforward filters in input space" + (" (first 64 of 70)" if out_channels > 64 else "")
    weight = stack.layer(0).feedforward
    for tile, row in zip(shown, weight, strict=False):
        colour = (row / (2 * row.abs().max()) + 0.5).permute(1, 2, 0)
        oracle = colour if channels == 3 else row.mean(dim=0)
        assert np.allclose(tile, oracle, atol=1e-6)


def test_filters_of_a_later_layer_are_images(tmp_path: Path, drawn: list[Figure], digits: Dataset) -> None:
    stack, images = make_stack(), to_unit(digits.test_images[:40])
    filters(stack, 1, images, tmp_path / "filters.png")
    assert spread(tmp_path / "filters.png") > 0.05
    [figure] = drawn
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [tile.shape for tile in shown] == [(8, 8)] * 7
    assert figure.get_suptitle() == "layer 1: activity-weighted mean of 40 test images, less their mean"


def test_preferred_images_are_weighted_means(digits: Dataset) -> None:
    stack, images = make_stack(), to_unit(digits.test_images[:12])
    activity = stack(images).flatten(1)  # a dense layer: one position
    found = preferred_images(stack, 1, images)
    for channel in range(7):
        weights = [float(value) for value in activity[:, channel]]
        oracle = torch.zeros(1, 8, 8)
        if sum(weights) > 0:
            oracle = sum(weight * image for weight, image in zip(weights, images, strict=True)) / sum(weights)
            oracle = oracle - images.mean(dim=0)
        torch.testing.assert_close(found[channel], oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_of_signals_are_curves(tmp_path: Path, drawn: list[Figure], channels: int) -> None:
    layers = [
        {"out_channels": 5, "kernel_size": [1, 16], "pool": [1, 4]},
        {"out_channels": 3, "kernel_size": "full"},
    ]
    source = InputConfig(in_channels=channels, height=1, width=64, num_classes=0)
    stack = Stack(parse(ModelConfig, {"layers": layers}), source, seed=1).eval()
    images = torch.randn(30, channels, 1, 64, generator=torch.Generator().manual_seed(0))
    for index in (0, 1):
        filters(stack, index, images, tmp_path / f"{index}.png")
        assert spread(tmp_path / f"{index}.png") > 0.05
    weight, spectra = stack.layer(0).feedforward[:, :, 0], np.abs(np.fft.rfft(images[:, :, 0].numpy()))
    activity = stack(images).flatten(1).numpy()
    means = [(spectra.transpose(1, 2, 0) * (row / max(row.sum(), 1e-12))).sum(axis=2) for row in activity.T]
    preferred = [mean - spectra.mean(axis=0) * (row.sum() > 0) for mean, row in zip(means, activity.T, strict=True)]
    for figure, expected in zip(drawn, (weight, preferred), strict=True):
        panels = [axes for axes in figure.axes if axes.lines]
        for axes, curves in zip(panels, expected, strict=True):
            assert not axes.images
            assert len(axes.lines) == channels + 1  # and the line at zero
            for line, curve in zip(axes.lines[1:], curves, strict=True):
                assert np.allclose(line.get_ydata(), curve, atol=1e-3)
    assert drawn[1].get_suptitle() == "layer 1: activity-weighted mean spectrum of 30 test windows, less their mean"


def test_a_silent_channel_prefers_nothing(digits: Dataset, tmp_path: Path) -> None:
    stack, images = make_stack(), to_unit(digits.test_images[:12])
    with torch.no_grad():
        stack.layer(1).feedforward[2] = -1.0
    assert torch.equal(preferred_images(stack, 1, images)[2], torch.zeros(1, 8, 8))
    filters(stack, 1, images, tmp_path / "filters.png")


@pytest.mark.parametrize(
    ("normalize", "whiten"), [("none", False), ("contrast", False), ("none", True), ("contrast", True)]
)
def test_input_filters_give_the_drive(digits: Dataset, normalize: str, whiten: bool) -> None:
    """W Π J is what acts on a raw patch: up to the patch's scale and a constant, it gives the layer's drive."""
    stack = make_stack(normalize=normalize, whiten=whiten)
    layer, images = stack.layer(0), to_unit(digits.train_images[:200])
    if whiten:
        layer.calibrate(images)
    patches = torch.nn.functional.unfold(images[:5].double(), 3)  # [5, P, L]
    raw = input_filters(layer).double().flatten(1) @ patches
    if normalize == "contrast":
        raw = raw / patches.std(dim=1, correction=0, keepdim=True).clamp(min=0.1)
    drive = layer.drive(layer.prepare(images[:5])).double().reshape(10, 5, -1).transpose(0, 1)
    difference = drive - raw
    # with whitening, −W Π μ remains: one constant a channel
    offset = difference.mean(dim=(0, 2), keepdim=True) if whiten else torch.zeros(1, 10, 1)
    assert float((difference - offset).abs().max()) < 1e-5 * float(drive.abs().max())
