"""Labels of images as a layer sees them: classes, or unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from simmatch.layer import SimilarityMatchingConv2d

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


def one_hot(labels: Tensor, layer: SimilarityMatchingConv2d, positions: int) -> Tensor:
    """z [num_classes, B · positions] of checked labels [B]: zero columns where unlabelled."""
    check_labels(labels, layer.num_classes, len(labels))
    classes = torch.arange(layer.num_classes, device=layer.label.device)
    z = (rearrange(labels.to(classes), "b -> 1 b") == rearrange(classes, "c -> c 1")).to(layer.label.dtype)
    return z.repeat_interleave(positions, dim=1)
