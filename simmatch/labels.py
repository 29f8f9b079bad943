"""Labels of images: checks, and one-hot encoding."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

UNLABELLED = -1
"""Label of an image of unknown class: V neither learns from the image nor drives its activities."""


def check_labels(labels: Any, num_classes: int, images: int) -> None:
    """Raise ValueError unless labels are integers [images] in 0 … num_classes − 1 or `UNLABELLED`.

    >>> check_labels(torch.tensor([0, 9, UNLABELLED]), num_classes=10, images=3)
    >>> check_labels(torch.tensor([0, 10]), num_classes=10, images=2)
    Traceback (most recent call last):
    ValueError: labels: expected classes 0 … 9 or -1, got 10
    """
    given = f"{list(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
    if num_classes == 0:
        raise ValueError(f"labels: expected None for a layer with num_classes=0, got {given}")
    integers = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not integers or labels.dtype == torch.bool or labels.shape != (images,):
        raise ValueError(f"labels: expected a tensor of integers [{images}], the class of each image, got {given}")
    labels = labels.long()  # comparisons need a signed format
    valid = (labels == UNLABELLED) | ((labels >= 0) & (labels < num_classes))
    if not bool(valid.all()):
        worst = int(labels[~valid][0])
        raise ValueError(f"labels: expected classes 0 … {num_classes - 1} or {UNLABELLED}, got {worst}")


def one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """One-hot labels z [num_classes, B], with zero columns where unlabelled.

    Parameters
    ----------
    labels: [B], valid: see `check_labels`.
    num_classes: number of rows of z.
    like: a tensor with the dtype and device of the result.

    >>> one_hot(torch.tensor([1, UNLABELLED]), num_classes=3, like=torch.zeros(()))
    tensor([[0., 0.],
            [1., 0.],
            [0., 0.]])
    """
    classes = torch.arange(num_classes, device=like.device)
    return (rearrange(labels.to(classes), "b -> 1 b") == rearrange(classes, "c -> c 1")).to(like.dtype)


def distinct(labels: Tensor) -> Tensor:
    """The classes in labels [N], ascending.

    >>> distinct(torch.tensor([7, 3, 7]))
    tensor([3, 7])
    """
    classes: Tensor = torch.unique(labels)
    return classes
