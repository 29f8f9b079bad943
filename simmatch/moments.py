"""Mean and scatter of rows that nobody holds all of: added part by part, and over ranks (`moments_over_ranks`).

    n, m = Σ x / n, S = Σ (x − m)(x − m)ᵀ
    n = n₁ + n₂, m = (n₁ m₁ + n₂ m₂) / n, S = S₁ + S₂ + (n₁ n₂ / n) (m₂ − m₁)(m₂ − m₁)ᵀ   of two sets of rows together

With weights, n = Σ w, m = Σ w x / n and S = Σ w (x − m)(x − m)ᵀ; forgetting multiplies the weights of all rows so far.

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
    count: n, number of rows so far, or the sum of their weights.
    mean: [P], m.
    scatter: [P, P], S.

    >>> moments = Moments(2)
    >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> moments.add(torch.tensor([[4.0, 1.0]]))
    >>> moments.count, moments.mean.tolist(), moments.scatter.tolist()
    (3, [2.0, 1.0], [[8.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count: float = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of rows [n, P]."""
        moments = cls(rows.shape[1], rows.device)
        moments.add(rows)
        return moments

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [n, P], of which at most `ROWS` are copied at a time, with weights [n] > 0; None: 1 each."""
        for start in range(0, len(rows), ROWS):
            some = slice(start, start + ROWS)
            centred, shift, alpha = self._joined(rows[some], None if weights is None else weights[some])
            self.scatter += centred.T @ centred
            self.scatter.addr_(shift, shift, alpha=alpha)

    def join(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add rows to count and mean alone.

        Returns
        -------
        Z [n + 1, P], float64: what S lacks is ZᵀZ. One row, if n is 1: its own difference from its mean is zero.

        >>> moments = Moments(2)
        >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> added = moments.join(torch.tensor([[4.0, 1.0]]))
        >>> moments.count, moments.mean.tolist(), (moments.scatter + added.T @ added).round(decimals=9).tolist()
        (3, [2.0, 1.0], [[8.0, 0.0], [0.0, 0.0]])
        """
        centred, shift, alpha = self._joined(rows, weights)
        between = (shift * alpha**0.5)[None]
        return between if len(rows) == 1 else torch.cat([centred.double(), between])

    def _joined(self, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Count and mean with rows; Z, v and a, such that ZᵀZ + a v vᵀ is the change of the scatter."""
        if weights is None:
            total: float = len(rows)
            mean = rows.mean(dim=0, dtype=torch.float64)
        else:
            total = float(weights.sum(dtype=torch.float64))
            first = rows[0].double()  # as an origin: the mean of what is constant has no rounding error
            mean = first + weights.double() @ (rows.double() - first) / total
        centred = rows - mean.to(rows.dtype)
        if weights is not None:
            centred *= weights.sqrt().to(rows.dtype)[:, None]
        shift, count = mean - self.mean, self.count + total
        alpha = self.count * total / count
        self.mean += shift * (total / count)
        self.count = count
        return centred, shift, alpha

    def fade(self, factor: float) -> None:
        """Multiply the weights of all rows so far.

        >>> moments = Moments.of(torch.tensor([[0.0], [2.0]]))
        >>> moments.fade(0.5)
        >>> moments.count, moments.mean.tolist(), moments.scatter.tolist()
        (1.0, [1.0], [[1.0]])
        """
        self.count *= factor
        self.scatter *= factor

    def widen(self, size: int, value: float) -> None:
        """Give all rows so far more values, the same in each: P grows by `size`.

        >>> moments = Moments.of(torch.tensor([[0.0], [2.0]]))
        >>> moments.widen(1, -1.0)
        >>> moments.mean.tolist(), moments.scatter.tolist()
        ([1.0, -1.0], [[2.0, 0.0], [0.0, 0.0]])
        """
        self.mean = torch.cat([self.mean, self.mean.new_full((size,), value)])
        self.scatter = torch.nn.functional.pad(self.scatter, (0, size, 0, size))

    def copy(self) -> Moments:
        """The same sums, in tensors of their own."""
        copied = Moments(0)
        copied.count, copied.mean, copied.scatter = self.count, self.mean.clone(), self.scatter.clone()
        return copied

    def cpu(self) -> Moments:
        """The same sums in memory of the host."""
        moved = Moments(0)
        moved.count, moved.mean, moved.scatter = self.count, self.mean.cpu(), self.scatter.cpu()
        return moved

    @property
    def covariance(self) -> Tensor:
        """S / n, [P, P]."""
        return self.scatter / self.count
