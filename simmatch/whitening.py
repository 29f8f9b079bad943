"""ZCA whitening of patches: x̃ = Π (x − μ), measured once before a layer learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.moments import Moments


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


def zca(moments: Moments, ridge: float, dtype: torch.dtype) -> tuple[Whitening, float]:
    """ZCA whitening of normalised patches with these moments, and the mean square ⟨‖x̃‖²⟩ of the whitened patches.

    Π = (C_x + ridge · mean eigenvalue · I)^(-1/2), with C_x the covariance of the patches, decomposed in float64. With
    whitened patches the similarity XᵀX becomes XᵀC_x⁻¹X of the canonical correlation objective, regularised.

    >>> patches = torch.randn(100, 9, generator=torch.Generator().manual_seed(0))
    >>> whitening, power = zca(Moments.of(patches), ridge=0.1, dtype=torch.float32)
    >>> whitening.matrix.shape, 8 < power < 9
    (torch.Size([9, 9]), True)
    """
    eigenvalues, vectors = torch.linalg.eigh(moments.covariance)
    eigenvalues = eigenvalues.clamp(min=0.0)
    # directions in which the patches hardly vary must not be scaled beyond what their dtype can hold
    spectrum = (eigenvalues + ridge * eigenvalues.mean()).clamp(min=torch.finfo(dtype).eps)
    matrix = (vectors * spectrum.rsqrt()) @ vectors.T
    return Whitening(matrix.to(dtype), moments.mean.to(dtype)), float((eigenvalues / spectrum).sum())
