"""What a layer refuses, before anything is computed or changed: one sentence with what was expected and given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simmatch.geometry import PatchConfig, Patches, Whitening
from simmatch.plasticity import Statistics, Weights

DTYPES = (torch.float32, torch.float64)
"""Formats that a layer computes in."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a format of the weights that a layer does not compute in."""
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


def check_patches(patches: Patches, config: PatchConfig, whitening: Whitening | None) -> None:
    """Raise ValueError unless a layer of these patches, with the tensors of this whitening, prepared them."""
    theirs = patches.whitening
    same = theirs is None if whitening is None else theirs is not None and theirs.matrix is whitening.matrix
    if not same or patches.config != config:
        raise ValueError(f"patches: expected some that this layer prepared, with {config}, got {patches.config}")


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
