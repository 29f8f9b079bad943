"""ZCA whitening of patches: x̃ = Π (x − μ), measured once before a layer learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.moments import ROWS


@dataclass(frozen=True)
class Whitening:
    """The affine map x̃ = Π (x_normalised − μ).

    Attributes
    ----------
    matrix: [P, P], Π, symmetric.
    mean: [P], μ.

    >>> Whitening(torch.eye(4), torch.ones(4)).offset
    tensor([1., 1., 1., 1.])
    """

    matrix: Tensor
    mean: Tensor

    @property
    def offset(self) -> Tensor:
        """Π μ, [P]."""
        return self.matrix @ self.mean


def covariance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [P] and covariance [P, P] of rows [N, P] in float64: products in the rows' dtype, their sums in float64.

    >>> mean, matrix = covariance(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> mean.tolist(), matrix.tolist()
    ([1.0, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    """
    mean = rows.mean(dim=0, dtype=torch.float64)
    total = mean.new_zeros(len(mean), len(mean))
    for part in torch.split(rows, ROWS):
        centred = part - mean.to(part.dtype)
        total += centred.T @ centred
    return mean, total.div_(len(rows))


def zca(patches: Tensor, ridge: float) -> Whitening:
    """ZCA whitening of normalised patches [N, P], decomposed in float64 and returned in their dtype.

    Π = (C_x + ridge · mean eigenvalue · I)^(-1/2), with C_x the covariance of the patches. With whitened patches the
    similarity XᵀX becomes XᵀC_x⁻¹X of the canonical correlation objective, regularised.

    >>> zca(torch.randn(100, 9, generator=torch.Generator().manual_seed(0)), ridge=0.1).matrix.shape
    torch.Size([9, 9])
    """
    mean, spread = covariance(patches)
    eigenvalues, vectors = torch.linalg.eigh(spread)
    # directions in which the patches hardly vary must not be scaled beyond what their dtype can hold
    least = torch.finfo(patches.dtype).eps
    spectrum = (eigenvalues.clamp(min=0.0) + ridge * eigenvalues.mean()).clamp(min=least)
    matrix = (vectors * spectrum.rsqrt()) @ vectors.T
    return Whitening(matrix.to(patches.dtype), mean.to(patches.dtype))
