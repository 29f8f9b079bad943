"""Labels of images as a layer sees them: classes, or unknown."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

UNLABELLED = -1
"""Label of an image whose class is unknown: it contributes nothing to V and V nothing to it."""


def check_labels(labels: Any, num_classes: int, images: int) -> None:
    """Raise ValueError unless labels are integers, one per image, in 0 … num_classes − 1 or `UNLABELLED`."""
    given = f"{list(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
    if num_classes == 0:
        raise ValueError(f"labels: expected None for a layer with num_classes=0, got {given}")
    integers = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not integers or labels.dtype == torch.bool or labels.shape != (images,):
        raise ValueError(f"labels: expected a tensor of integers [{images}], the class of each image, got {given}")
    labels = labels.long()  # what unsigned formats lack: an order
    valid = (labels == UNLABELLED) | ((labels >= 0) & (labels < num_classes))
    if not bool(valid.all()):
        worst = int(labels[~valid][0])
        raise ValueError(f"labels: expected classes 0 … {num_classes - 1} or {UNLABELLED}, got {worst}")


def one_hot(labels: Tensor, num_classes: int, like: Tensor, *, images: int | None = None) -> Tensor:
    """z [num_classes, B] of labels [B], on the device and in the dtype of `like`: zero columns where unlabelled.

    images: B, if it is known.

    Raises
    ------
    ValueError
        Labels that are not integers [B] in 0 … num_classes − 1 or `UNLABELLED`.
    """
    check_labels(labels, num_classes, len(labels) if images is None else images)
    classes = torch.arange(num_classes, device=like.device)
    return (rearrange(labels.to(classes), "b -> 1 b") == rearrange(classes, "c -> c 1")).to(like.dtype)
