"""Checks of the arguments of a layer, made before anything is computed or changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simmatch.geometry import PatchConfig, Patches
from simmatch.plasticity import Statistics, Weights
from simmatch.whitening import Whitening

DTYPES = (torch.float32, torch.float64)
"""Dtypes that a layer supports."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless a layer supports a dtype for its weights.

    >>> check_dtype(torch.float16)
    Traceback (most recent call last):
    ValueError: dtype: expected torch.float32 or torch.float64, got torch.float16
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {DTYPES[0]} or {DTYPES[1]}, got {dtype}")


def check_images(x: Any, in_channels: int, weights: Tensor) -> None:
    """Raise ValueError unless x is [B, in_channels, H, W], of the dtype and on the device of the weights.

    >>> check_images(torch.rand(5, 3, 8, 8), in_channels=1, weights=torch.zeros(8, 1, 3, 3))
    Traceback (most recent call last):
    ValueError: images: expected [B, 1, H, W], got [5, 3, 8, 8]
    """
    if weights.dtype not in DTYPES:
        raise ValueError(f"layer: expected weights of {DTYPES[0]} or {DTYPES[1]}, got {weights.dtype}")
    if not isinstance(x, Tensor):
        raise ValueError(f"images: expected a torch.Tensor [B, {in_channels}, H, W], got {_kind(x)}")
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"images: expected [B, {in_channels}, H, W], got {list(x.shape)}")
    _check_like("images", x, weights)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "images: expected a tensor that does not require a gradient, as a layer learns without gradients, got one "
            "that does (detach it, or call the layer under torch.no_grad())"
        )


def check_patches(patches: Patches, config: PatchConfig, whitening: Whitening | None) -> None:
    """Raise ValueError unless patches were prepared with this configuration and with the tensors of this whitening.

    >>> config = PatchConfig(in_channels=1, kernel_size=3)
    >>> check_patches(Patches(config, None, (1, 1), matrix=torch.zeros(5, 9)), config, whitening=None)
    """
    given = patches.whitening
    same = given is None if whitening is None else given is not None and given.matrix is whitening.matrix
    if not same or patches.config != config:
        raise ValueError(f"patches: expected patches prepared by this layer, with {config}, got {patches.config}")


def check_not_empty(images: int) -> None:
    """Raise ValueError for an empty batch.

    >>> check_not_empty(0)
    Traceback (most recent call last):
    ValueError: images: expected a batch of at least one, got a batch of size 0
    """
    if images == 0:
        raise ValueError("images: expected a batch of at least one, got a batch of size 0")


def check_positions(positions: Any, batch_size: int, map_size: tuple[int, int]) -> None:
    """Raise ValueError unless positions are integers [batch_size, n] on a map of activities.

    >>> check_positions(torch.tensor([[0, 36]]), batch_size=1, map_size=(6, 6))
    Traceback (most recent call last):
    ValueError: positions: expected 0 … 35, got 36
    """
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
    """Raise ValueError unless y has the shape of the activities of a batch, and the dtype and device of the weights.

    >>> check_activities(torch.zeros(5, 8, 6, 6), (5, 8, 6, 6), weights=torch.zeros(8, 1, 3, 3))
    """
    if not isinstance(y, Tensor) or y.shape != shape:
        given = list(y.shape) if isinstance(y, Tensor) else _kind(y)
        raise ValueError(f"activities: expected {list(shape)}, got {given}")
    _check_like("activities", y, weights)


def check_statistics(statistics: Statistics, weights: Weights) -> None:
    """Raise ValueError unless the sums match these weights and were taken over at least one column.

    >>> weights = Weights(torch.zeros(8, 1, 3, 3), torch.eye(8), torch.zeros(8, 10))
    >>> check_statistics(Statistics(weights.feedforward, weights.lateral, weights.label, torch.eye(10), 0), weights)
    Traceback (most recent call last):
    ValueError: statistics: expected sums over at least one column, got a count of 0
    """
    if isinstance(statistics.count, int) and statistics.count < 1:
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


def check_weights(weights: Any, images: int) -> None:
    """Raise ValueError unless weights are numbers [images] in 0 … 1, some of them above 0.

    >>> check_weights(torch.tensor([1.0, 0.5]), images=2)
    >>> check_weights(torch.tensor([1.0, 1.5]), images=2)
    Traceback (most recent call last):
    ValueError: weights: expected numbers from 0 to 1, got 1.5
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.shape != (images,):
        given = f"{list(weights.shape)} of {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights: expected a tensor of floating-point numbers [{images}], one per image, got {given}")
    valid = (weights >= 0) & (weights <= 1)
    if not bool(valid.all()):
        raise ValueError(f"weights: expected numbers from 0 to 1, got {float(weights[~valid][0]):g}")
    if not bool((weights > 0).any()):
        raise ValueError("weights: expected one above 0, got none: there is nothing to learn from")


def _check_like(name: str, given: Tensor, weights: Tensor) -> None:
    if given.dtype != weights.dtype:
        raise ValueError(f"{name}: expected {weights.dtype}, the format of the layer's weights, got {given.dtype}")
    if given.device != weights.device:
        raise ValueError(f"{name}: expected a tensor on {weights.device}, as the layer's weights, got {given.device}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_classes(num_classes: int, before: int) -> None:
    """Raise ValueError if V is to have fewer classes than before.

    >>> check_classes(2, before=3)
    Traceback (most recent call last):
    ValueError: num_classes: expected at least 3, the classes so far, got 2
    """
    if num_classes < before:
        raise ValueError(f"num_classes: expected at least {before}, the classes so far, got {num_classes}")
