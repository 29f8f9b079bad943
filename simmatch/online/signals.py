"""What can be said of a record without its label: how well the layer's activities represent it.

    objective   ‖XᵀX − YᵀY‖² / ‖XᵀX‖²   over columns of the record: of the similarity-matching objective, its own share
    residual    ‖W X − M Y‖ / ‖W X‖      the part of the drive that lateral inhibition does not account for
    active      fraction of activities above zero

They are measured at up to `POSITIONS` positions, spread evenly over the map.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from simmatch.geometry import Patches, transform
from simmatch.plasticity import Weights

POSITIONS = 8
"""Most positions of a record at which it is measured: their similarities cost POSITIONS² (K + P) operations."""


def label_free_signals(patches: Patches, y: Tensor, weights: Weights) -> dict[str, Tensor]:
    """`objective`, `residual` and `active` of every record, [B] each.

    Parameters
    ----------
    patches: of B records, at all positions.
    y: [B, K, H', W'], their label-free activities.
    weights: all rows of W and M.

    >>> from simmatch.layer import SimilarityMatchingConv2d
    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> patches = layer.prepare(torch.rand(5, 1, 8, 8))
    >>> signals = label_free_signals(patches, layer.solve(patches).y, layer.weights)
    >>> {name: value.shape for name, value in signals.items()}
    {'objective': torch.Size([5]), 'residual': torch.Size([5]), 'active': torch.Size([5])}
    """
    columns = rearrange(y, "b k h w -> k (b h w)")
    images, count = len(y), min(POSITIONS, patches.positions)
    positions = torch.arange(count, device=y.device) * patches.positions // count
    index = (torch.arange(images, device=y.device).unsqueeze(1) * patches.positions + positions).flatten()
    x, chosen = columns_at(patches, positions), columns.index_select(1, index).T.contiguous()
    drive = x.flatten(0, 1) @ weights.feedforward.flatten(1).T
    unexplained = (drive - chosen @ weights.lateral).view(images, -1)
    outputs = rearrange(chosen, "(b n) k -> b n k", b=images)
    similarity = x @ x.mT
    return {
        "objective": _ratio((similarity - outputs @ outputs.mT).flatten(1), similarity.flatten(1)).square(),
        "residual": _ratio(unexplained, drive.view(images, -1)),
        "active": torch.sign(chosen).view(images, -1).mean(dim=1),
    }


def columns_at(patches: Patches, positions: Tensor) -> Tensor:
    """x̃ of every image at the positions [n]: [B, n, P].

    >>> from simmatch.layer import SimilarityMatchingConv2d
    >>> patches = SimilarityMatchingConv2d(1, 4, kernel_size=3).prepare(torch.rand(5, 1, 8, 8))
    >>> columns_at(patches, torch.tensor([0, 35])).shape
    torch.Size([5, 2, 9])
    """
    rows: Tensor
    if patches.matrix is not None:
        rows = rearrange(patches.matrix, "(b l) p -> b l p", l=patches.positions)[:, positions]
    else:
        assert patches.images is not None
        rows = patches.config.convolution.at(patches.images, positions)
        if patches.config.contrast:
            rows = rearrange(transform(rows.flatten(0, 1), patches.config), "(b n) p -> b n p", n=len(positions))
    whitening = patches.whitening
    if whitening is None or (patches.matrix is not None and patches.whitened):
        return rows
    return (rows - whitening.mean) @ whitening.matrix.T


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """‖part‖ / ‖whole‖ of every row, and 0 where both are 0."""
    least = torch.finfo(whole.dtype).tiny
    ratio: Tensor = torch.linalg.vector_norm(part, dim=1) / torch.linalg.vector_norm(whole, dim=1).clamp(min=least)
    return ratio
