"""Labels of images as a layer sees them: classes, or unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from simmatch.layer import SimilarityMatchingConv2d

UNLABELLED = -1
"""Label of an image whose class is unknown: it contributes nothing to V and V nothing to it."""


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a label outside 0 … num_classes − 1 that is not `UNLABELLED`."""
    valid = (labels == UNLABELLED) | ((labels >= 0) & (labels < num_classes))
    if not bool(valid.all()):
        worst = int(labels[~valid][0])
        raise ValueError(f"labels: expected classes 0 … {num_classes - 1} or {UNLABELLED}, got {worst}")


def one_hot(labels: Tensor, layer: SimilarityMatchingConv2d, positions: int) -> Tensor:
    """z [num_classes, B · positions] of checked labels [B]: zero columns where unlabelled."""
    check_labels(labels, layer.num_classes)
    classes = torch.arange(layer.num_classes, device=labels.device)
    z = (rearrange(labels, "b -> 1 b") == rearrange(classes, "c -> c 1")).to(layer.label.dtype)
    return z.repeat_interleave(positions, dim=1)
