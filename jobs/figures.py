"""Figures of a run: the filters of every layer, and the training curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from jobs.reporting import save_figure
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack
from simmatch.whitening import Whitening

Curves = dict[int, list[tuple[int, dict[str, float]]]]

PANELS = {
    "objective": "relative objective",
    "residual": "worst KKT residual",
    "num_iters": "iterations of the dynamics",
    "active_fraction": "active fraction",
    "dead_channels": "dead channels",
    "images_per_second": "images / s",
}


def training_curves(curves: Curves, path: Path) -> None:
    """One panel a metric, one line a layer."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for layer, curve in sorted(curves.items()):
            axes.plot([step for step, _ in curve], [values[metric] for _, values in curve], label=f"layer {layer}")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        if metric == "residual" and any(values[metric] > 0 for curve in curves.values() for _, values in curve):
            axes.set_yscale("log")
    if curves:
        figure.axes[0].legend()
    save_figure(figure, path)


def input_filters(layer: SimilarityMatchingConv2d) -> Tensor:
    """Rows of W as the input sees them, W Π J: [K, C, k, k]."""
    weight = rearrange(layer.feedforward, "k c h w -> k (c h w)")
    if layer.whiten:
        weight = weight @ Whitening(layer.whitening, layer.whitening_mean).matrix
    if layer.patch.contrast:
        weight = weight - weight.mean(dim=1, keepdim=True)
    return weight.reshape(layer.feedforward.shape)


def preferred_images(stack: Stack, index: int, images: Tensor) -> Tensor:
    """Mean of the images [B, C, H, W], weighted by each channel's mean activity, less the plain mean: [K, C, H, W].

    Of signals [B, C, 1, T] that of their spectra, [K, C, 1, T // 2 + 1]: windows are cut anywhere, so their means are
    near zero.
    """
    activity = stack.below(images, index + 1).flatten(2).mean(dim=2)
    weight = activity / activity.sum(dim=0).clamp(min=1e-12)
    less_mean = weight - weight.sum(dim=0) / len(images)  # a silent channel's weights are 0, and so is its image
    shown = torch.fft.rfft(images).abs() if _are_signals(images) else images
    return torch.einsum("bk,bchw->kchw", less_mean, shown)


def _are_signals(images: Tensor) -> bool:
    return images.shape[2] == 1 < images.shape[3]


def filters(stack: Stack, index: int, images: Tensor, path: Path, limit: int = 64) -> None:
    """Tiles of a layer's channels: filters of the first layer, preferred images of the others. Of signals, curves."""
    layer = stack.layer(index)
    if index == 0:
        tiles, title = input_filters(layer), f"layer {index}: feedforward filters in input space"
    else:
        tiles = preferred_images(stack, index, images)
        what = f"spectrum of {len(images)} test windows" if _are_signals(images) else f"of {len(images)} test images"
        title = f"layer {index}: activity-weighted mean {what}, less their mean"
    shown = tiles[:limit].cpu().float()
    columns = int(np.ceil(np.sqrt(len(shown))))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(0.8 * columns, 0.8 * rows + 0.5), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, tile in zip(grid, shown, strict=False):
        _show(axes, tile)
    more = f" (first {len(shown)} of {len(tiles)})" if len(tiles) > len(shown) else ""
    figure.suptitle(title + more, fontsize=10)
    save_figure(figure, path)


def _show(axes: matplotlib.axes.Axes, tile: Tensor) -> None:
    extent = float(tile.abs().amax()) or 1.0
    if _are_signals(tile.unsqueeze(0)):  # a curve for each channel
        axes.axhline(0.0, color="0.8", linewidth=0.5)
        axes.plot(tile[:, 0].T.numpy(), linewidth=0.8)
        axes.set_ylim(-1.1 * extent, 1.1 * extent)
    elif tile.shape[0] == 3:
        axes.imshow(rearrange(tile / (2 * extent) + 0.5, "c h w -> h w c").numpy())
    else:
        axes.imshow(tile.mean(dim=0).numpy(), cmap="RdBu_r", vmin=-extent, vmax=extent)
