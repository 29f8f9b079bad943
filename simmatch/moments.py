"""Mean and scatter of rows that nobody holds all of: added part by part, and over ranks (`moments_over_ranks`).

    n, m = Σ x / n, S = Σ (x − m)(x − m)ᵀ
    n = n₁ + n₂, m = (n₁ m₁ + n₂ m₂) / n, S = S₁ + S₂ + (n₁ n₂ / n) (m₂ − m₁)(m₂ − m₁)ᵀ   of two sets of rows together

Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048
"""Rows per matrix product: a longer sum in float32 would lose digits."""


class Moments:
    """Count, mean and scatter of rows: products in the dtype of the rows, their sums in float64.

    Parameters
    ----------
    size: P, values of a row.
    device: of the sums.

    Attributes
    ----------
    count: n, number of rows so far.
    mean: [P], m.
    scatter: [P, P], S.

    >>> moments = Moments(2)
    >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> moments.add(torch.tensor([[4.0, 1.0]]))
    >>> moments.count, moments.mean.tolist(), moments.scatter.tolist()
    (3, [2.0, 1.0], [[8.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of rows [n, P]."""
        moments = cls(rows.shape[1], rows.device)
        moments.add(rows)
        return moments

    def add(self, rows: Tensor) -> None:
        """Add rows [n, P], of which at most `ROWS` are copied at a time."""
        for part in torch.split(rows, ROWS):
            if len(part) > 0:
                self._add(part)

    def _add(self, rows: Tensor) -> None:
        mean = rows.mean(dim=0, dtype=torch.float64)
        centred = rows - mean.to(rows.dtype)
        self.scatter += centred.T @ centred
        shift, count = mean - self.mean, self.count + len(rows)
        self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / count)
        self.mean += shift * (len(rows) / count)
        self.count = count

    def cpu(self) -> Moments:
        """The same sums in memory of the host."""
        moved = Moments(0)
        moved.count, moved.mean, moved.scatter = self.count, self.mean.cpu(), self.scatter.cpu()
        return moved

    @property
    def covariance(self) -> Tensor:
        """S / n, [P, P]."""
        return self.scatter / self.count
