"""What a layer refuses, before anything is computed or changed: one sentence with what was expected and given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from simmatch.plasticity import Statistics, Weights

DTYPES = (torch.float32, torch.float64)
"""Formats that a layer computes in."""


def check_arguments(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int,
    padding: int,
    num_classes: int,
    label_gain: float,
    normalize: str,
    contrast_floor: float,
    whiten_ridge: float,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError, naming the argument, for values of `SimilarityMatchingConv2d` that make no layer."""
    positive = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel_size,
        "stride": stride,
    }
    for name, value in positive.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    for name, value in {"padding": padding, "num_classes": num_classes}.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a nonnegative integer, got {value!r}")
    if not (math.isfinite(label_gain) and label_gain >= 0):
        raise ValueError(f"label_gain: expected a finite nonnegative number, got {label_gain!r}")
    if label_gain > 0 and num_classes == 0:
        raise ValueError(f"num_classes: expected at least 1 with label_gain={label_gain:g}, got 0")
    if normalize not in ("none", "contrast"):
        raise ValueError(f"normalize: expected 'none' or 'contrast', got {normalize!r}")
    if not 0 < contrast_floor < math.inf:
        raise ValueError(f"contrast_floor: expected a finite positive number, got {contrast_floor!r}")
    if not 0 <= whiten_ridge < math.inf:
        raise ValueError(f"whiten_ridge: expected a finite nonnegative number, got {whiten_ridge!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {DTYPES[0]} or {DTYPES[1]}, got {dtype}")


def check_images(x: Any, in_channels: int, weights: Tensor) -> None:
    """Raise ValueError unless x is [B, in_channels, H, W] of the format and on the device of the weights."""
    if weights.dtype not in DTYPES:
        raise ValueError(f"layer: expected weights of {DTYPES[0]} or {DTYPES[1]}, got {weights.dtype}")
    if not isinstance(x, Tensor):
        raise ValueError(f"images: expected a torch.Tensor [B, {in_channels}, H, W], got {_kind(x)}")
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"images: expected [B, {in_channels}, H, W], got {list(x.shape)}")
    _check_like("images", x, weights)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "images: expected a tensor without gradient, for a layer learns without any, got one that requires it "
            "(detach it, or call the layer under torch.no_grad())"
        )


def check_some(images: int) -> None:
    """Raise ValueError for a batch that nothing can be learnt from."""
    if images == 0:
        raise ValueError("images: expected a batch of at least one, got a batch of size 0")


def check_positions(positions: Any, batch_size: int, map_size: tuple[int, int]) -> None:
    """Raise ValueError unless positions are integers [batch_size, n] on a map of activities."""
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions: expected integers [{batch_size}, n], got {_kind(positions)}")
    if positions.ndim != 2 or positions.shape[0] != batch_size or positions.shape[1] == 0:
        raise ValueError(f"positions: expected [{batch_size}, n] with n ≥ 1, got {list(positions.shape)}")
    last = map_size[0] * map_size[1] - 1
    if positions.numel():
        least, largest = (int(value) for value in positions.aminmax())
        if least < 0 or largest > last:
            raise ValueError(f"positions: expected 0 … {last}, got {least if least < 0 else largest}")


def check_activities(y: Any, shape: tuple[int, ...], weights: Tensor) -> None:
    """Raise ValueError unless y has the shape of the activities of a batch, and the format of the weights."""
    if not isinstance(y, Tensor) or y.shape != shape:
        given = list(y.shape) if isinstance(y, Tensor) else _kind(y)
        raise ValueError(f"activities: expected {list(shape)}, got {given}")
    _check_like("activities", y, weights)


def check_statistics(statistics: Statistics, weights: Weights) -> None:
    """Raise ValueError unless the sums are those of a layer with these weights, over at least one column."""
    if statistics.count < 1:
        raise ValueError(f"statistics: expected sums over at least one column, got a count of {statistics.count}")
    classes = weights.label.shape[1]
    expected = {
        "yx": weights.feedforward.shape,
        "yy": weights.lateral.shape,
        "yz": weights.label.shape,
        "zz": torch.Size([classes, classes]),
    }
    for name, shape in expected.items():
        tensor = getattr(statistics, name)
        if tensor.shape != shape:
            raise ValueError(f"statistics: expected {name} {list(shape)}, got {list(tensor.shape)}")
        _check_like(f"statistics: {name}", tensor, weights.lateral)


def _check_like(name: str, given: Tensor, weights: Tensor) -> None:
    if given.dtype != weights.dtype:
        raise ValueError(f"{name}: expected {weights.dtype}, the format of the layer's weights, got {given.dtype}")
    if given.device != weights.device:
        raise ValueError(f"{name}: expected a tensor on {weights.device}, as the layer's weights, got {given.device}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
