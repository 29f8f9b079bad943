"""Mean and scatter of rows that nobody holds all of: added part by part, and over ranks (`moments_over_ranks`).

`Moments` are those of all rows, `ClassMoments` those of each class, with the sum of their scatters.

    n, m = Σ x / n, S = Σ (x − m)(x − m)ᵀ
    n = n₁ + n₂, m = (n₁ m₁ + n₂ m₂) / n, S = S₁ + S₂ + (n₁ n₂ / n) (m₂ − m₁)(m₂ − m₁)ᵀ   of two sets of rows together

With weights, n is their sum, and so are the other sums; forgetting multiplies the weights of all rows so far.

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


class ClassMoments:
    """Counts and means of classes, and the sum of their scatters, all in float64; rows may have weights.

    A class that comes later needs nothing of the rows before it.

    Parameters
    ----------
    size: F, values of a row.

    Attributes
    ----------
    counts: [classes], n_c, the sums of weights.
    means: [classes, F], μ_c.
    scatter: [F, F], W = Σ_c Σ (x − μ_c)(x − μ_c)ᵀ.

    >>> moments = ClassMoments(2)
    >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 0]))
    >>> moments.add(torch.tensor([[4.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 1]))
    >>> moments.counts.tolist(), moments.means.tolist(), moments.scatter.round(decimals=9).tolist()
    ([3.0, 1.0], [[2.0, 1.0], [5.0, 5.0]], [[8.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.means = torch.zeros(0, size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    @property
    def count(self) -> float:
        """n, the sum of the counts."""
        return float(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """[F], of all rows."""
        first = self.means[self.counts.argmax()]  # as an origin: the mean of what is constant has no rounding error
        return first + self.counts @ (self.means - first) / self.counts.sum()

    def add(self, rows: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [n, F] of classes [n], of which at most `ROWS` are copied at a time, with weights [n] > 0."""
        for start in range(0, len(rows), ROWS):
            some = slice(start, start + ROWS)
            added = self.join(rows[some], labels[some], None if weights is None else weights[some])
            self.scatter.addmm_(added.T, added)

    def join(self, rows: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add rows to counts and means alone.

        Returns
        -------
        Z [m, F], m ≤ n + classes: what W lacks is ZᵀZ.

        >>> moments = ClassMoments(1)
        >>> [moments.join(torch.tensor([[value]]), torch.tensor([0])).tolist() for value in (0.0, 2.0)]
        [[], [[1.4142135623730951]]]
        """
        self.grow(int(labels.max()) + 1)
        for number in torch.unique(labels[self.counts[labels] == 0]):  # an origin, so that what is constant stays so
            self.means[number] = rows[labels == number][0]
        weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
        own = torch.nn.functional.one_hot(labels, len(self.counts)) * weights[:, None]
        totals, distance = own.sum(dim=0), rows.double() - self.means[labels]
        shift = (own.T @ distance) / torch.where(totals > 0, totals, 1.0)[:, None]
        after = self.counts + totals
        share = torch.where(after > 0, totals / torch.where(after > 0, after, 1.0), 0.0)
        between = shift * (self.counts * share).sqrt()[:, None]
        within = (distance - shift[labels]) * weights.sqrt()[:, None]
        several, old = labels.bincount(minlength=len(totals)) > 1, (self.counts > 0) & (totals > 0)
        self.means += shift * share[:, None]
        self.counts = after
        return torch.cat([within[several[labels]], between[old]])

    def fade(self, factor: float) -> None:
        """Multiply the weights of all rows so far.

        >>> moments = ClassMoments(1)
        >>> moments.add(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0]))
        >>> moments.fade(0.5)
        >>> moments.counts.tolist(), moments.means.tolist(), moments.scatter.tolist()
        ([1.0], [[1.0]], [[1.0]])
        """
        self.counts *= factor
        self.scatter *= factor

    def grow(self, classes: int) -> None:
        """Have room for classes 0 … `classes` − 1.

        >>> moments = ClassMoments(3)
        >>> moments.grow(2)
        >>> moments.counts.tolist(), moments.means.shape
        ([0.0, 0.0], torch.Size([2, 3]))
        """
        if (more := classes - len(self.counts)) > 0:
            self.counts = torch.nn.functional.pad(self.counts, (0, more))
            self.means = torch.nn.functional.pad(self.means, (0, 0, 0, more))
