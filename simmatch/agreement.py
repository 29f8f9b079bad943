"""How well an encoder or filter (`simmatch.encoder`) reproduces the activities of its layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from simmatch.encoder import Encoder, Filter, true_activities
from simmatch.layer import SimilarityMatchingConv2d


@dataclass(frozen=True)
class Agreement:
    """How well ŷ reproduces y over the columns of some images. If ŷ = y, the error is 0 and all others are 1.

    Attributes
    ----------
    cosine: mean over columns of the cosine between ŷ and y; 1 where both are silent, 0 where only one is.
    correlation: mean over channels of the correlation over columns; 1 where both are constant, 0 where only one is.
    support: mean over columns of the Jaccard index: channels active in both over channels active in either; 1 where
        both are silent.
    error: ‖ŷ − y‖ / ‖y‖ over all values; 0/0 = 0.

    >>> compare(torch.eye(3), torch.eye(3)) == Agreement(cosine=1.0, correlation=1.0, support=1.0, error=0.0)
    True
    """

    cosine: float
    correlation: float
    support: float
    error: float


def agreement(encoded: Encoder | Filter, layer: SimilarityMatchingConv2d, images: Tensor) -> Agreement:
    """Compare an encoder or filter with the exact activities of its layer, at all positions of images [B, C, H, W].

    The scale of a filter is arbitrary, so each of its channels is first multiplied by its least-squares gain.

    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> exact = Encoder(layer.feedforward, torch.zeros(4), layer.patch)  # M = I before learning
    >>> agreement(exact, layer, torch.ones(2, 1, 8, 8)).error < 1e-4
    True
    """
    if isinstance(encoded, Encoder):
        maps = encoded(images)
    else:
        maps = F.conv2d(images, encoded.weight, encoded.bias, layer.patch.stride, layer.patch.padding).relu()
    y, estimate = true_activities(layer, images).double(), rearrange(maps, "b k h w -> k (b h w)").double()
    if isinstance(encoded, Filter):
        estimate = estimate * _ratio((estimate * y).sum(dim=1), estimate.square().sum(dim=1), 0.0).unsqueeze(1)
    return compare(estimate, y)


def compare(estimate: Tensor, y: Tensor) -> Agreement:
    """`Agreement` of activities ŷ and y, both [K, N] ≥ 0.

    >>> compare(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).support
    0.5
    """
    either, both = (estimate > 0) | (y > 0), (estimate > 0) & (y > 0)
    centred, estimate_centred = (values - values.mean(dim=1, keepdim=True) for values in (y, estimate))
    spread = torch.stack([values.amax(dim=1) > values.amin(dim=1) for values in (estimate, y)])
    norms = estimate_centred.norm(dim=1) * centred.norm(dim=1)
    correlation = _ratio((estimate_centred * centred).sum(dim=1), norms, 0.0)
    correlation = torch.where(spread.all(dim=0), correlation, (~spread.any(dim=0)).to(correlation))
    cosine = _ratio((estimate * y).sum(dim=0), estimate.norm(dim=0) * y.norm(dim=0), 0.0)
    cosine = torch.where(either.any(dim=0), cosine, 1.0)
    error, length = float((estimate - y).norm()), float(y.norm())
    return Agreement(
        cosine=float(cosine.mean()),
        correlation=float(correlation.mean()),
        support=float(_ratio(both.sum(dim=0).double(), either.sum(dim=0).double(), 1.0).mean()),
        error=error / length if length > 0 else (0.0 if error == 0 else float("inf")),
    )


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """numerator / denominator, and `otherwise` where the denominator is zero."""
    some = denominator > 0
    return torch.where(some, numerator / torch.where(some, denominator, 1.0), otherwise)
