"""Rows whose head is the class means of fixed features: nearest mean, streaming linear discriminant analysis, RanDumb.

    nearest mean      argmin_c ‖φ − m_c‖²
    discriminant      argmax_c  w_c·φ − ½ w_c·m_c + log(n_c / n),   w_c = Σ⁻¹ m_c,   Σ = (1 − ρ) S/n + ρ (tr S / n F) I

with S the scatter within classes, from sums alone: nothing of the past is kept, and the order of records does not
matter. Source of the discriminant: Hayes & Kanan, "Lifelong machine learning with deep streaming linear discriminant
analysis" (2020). RanDumb is the same on random Fourier features of the pixels: Prabhu et al., "Random representations
outperform online continually learned representations" (2024), with the shrinkage of its code: oracle approximating
(Chen et al. 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jobs.benchmarks.stream.rows import NO_CLASS
from simmatch.labels import UNLABELLED
from simmatch.moments import ClassMoments
from simmatch.seeding import seeded

RENEWED = 0.05
"""Growth of the number of records after which a discriminant is solved anew; and where a segment ends."""


class _ByClass:
    """A `Row` of fixed features without its prediction.

    Parameters
    ----------
    function: records [B, C, H, W] → features [B, F].
    classes: number of classes.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], classes: int) -> None:
        self.function, self.counts = function, torch.zeros(classes, dtype=torch.float64)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`; only labelled records are learnt from."""
        given = labels != UNLABELLED
        if bool(given.any()):
            self.counts += torch.bincount(labels[given], minlength=len(self.counts))
            self._add(self.function(x[given]).double(), labels[given])

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn(x, labels)

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`: the class with the largest score, of those that have been seen."""
        if not bool(self.counts.any()):
            return torch.full((len(x),), NO_CLASS)
        scores = self._scores(self.function(x).double())
        return torch.where(self.counts > 0, scores, -torch.inf).argmax(dim=1)

    def end_segment(self, number: int) -> None:
        """Nothing."""

    def _add(self, features: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def _scores(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class NearestMean(_ByClass):
    """The class whose mean is nearest.

    >>> row = NearestMean(lambda x: x.flatten(1), size=2, classes=3)
    >>> row.learn(torch.tensor([[0.0, 0.0], [4.0, 4.0]]).reshape(2, 1, 1, 2), torch.tensor([2, 1]))
    >>> row.predict(torch.tensor([[1.0, 1.0]]).reshape(1, 1, 1, 2))
    tensor([2])
    """

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, classes: int) -> None:
        super().__init__(function, classes)
        self.sums = torch.zeros(classes, size, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Of sums and counts."""
        return self.sums.nbytes + self.counts.nbytes

    def _add(self, features: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, features)

    def _scores(self, features: Tensor) -> Tensor:
        means = self.sums / self.counts.clamp(min=1.0)[:, None]
        return features @ means.T - 0.5 * means.square().sum(dim=1)


class StreamingDiscriminant(_ByClass):
    """Linear discriminant analysis from sums, with the least that has to be kept.

    Parameters
    ----------
    size: F.
    shrinkage: ρ in [0, 1]; None: the oracle-approximating one.

    >>> row = StreamingDiscriminant(lambda x: x.flatten(1), size=2, classes=2, shrinkage=0.1)
    >>> row.learn(torch.rand(20, 1, 1, 2) + torch.arange(20).reshape(20, 1, 1, 1) % 2, torch.arange(20) % 2)
    >>> row.predict(torch.tensor([[0.0, 0.0], [2.0, 2.0]]).reshape(2, 1, 1, 2))
    tensor([0, 1])
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], size: int, classes: int, shrinkage: float | None = None
    ) -> None:
        super().__init__(function, classes)
        self.shrinkage, self.moments = shrinkage, ClassMoments(size)
        self.moments.grow(classes)
        self._solved: tuple[float, Tensor, Tensor] | None = None  # records, w [F, classes], the rest of the scores

    def end_segment(self, number: int) -> None:
        """See `Row`: what is asked next is answered from all records so far."""
        self._solved = None

    @property
    def nbytes(self) -> int:
        """Of counts, means and scatter."""
        return self.counts.nbytes + self.moments.means.nbytes + self.moments.scatter.nbytes

    def covariance(self) -> Tensor:
        """Σ, [F, F]."""
        within = self.moments.scatter / self.moments.count
        level = within.trace() / len(within)
        share = oracle_shrinkage(within, self.moments.count) if self.shrinkage is None else self.shrinkage
        within *= 1 - share
        within.diagonal().add_(share * level)
        return within

    def _add(self, features: Tensor, labels: Tensor) -> None:
        self.moments.add(features, labels)

    def _scores(self, features: Tensor) -> Tensor:
        count = self.moments.count
        if self._solved is None or count > (1 + RENEWED) * self._solved[0]:
            self._solved = (count, *self._solution())
        _, weights, bias = self._solved
        return features @ weights + bias

    def _solution(self) -> tuple[Tensor, Tensor]:
        covariance, means = self.covariance(), self.moments.means
        covariance.diagonal().add_(1e-9 * covariance.trace() / len(covariance))  # pixels that are always black
        weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))
        return weights, (self.counts / self.counts.sum()).log() - 0.5 * (means.T * weights).sum(dim=0)


def oracle_shrinkage(covariance: Tensor, count: float) -> float:
    """ρ of the oracle-approximating estimator, from a covariance [F, F] of `count` records.

    Source: Chen, Wiesel, Eldar & Hero, "Shrinkage algorithms for MMSE covariance estimation" (2010), in the form that
    scikit-learn uses, without the terms of order 1/F.

    >>> oracle_shrinkage(torch.eye(3), 10)
    1.0
    """
    size = len(covariance)
    squares, level = float(covariance.square().mean()), float(covariance.trace()) / size
    below = (count + 1) * (squares - level**2 / size)
    return 1.0 if below <= 0 else min(1.0, (squares + level**2) / below)


def fourier_features(size: int, inputs: int, gamma: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Random features of a Gaussian kernel exp(−γ ‖x − x'‖²): √(2/F) cos(Ω x + b).

    Parameters
    ----------
    size: F.
    inputs: values of a record.
    gamma: γ, 1 / square units of a record.

    Source: Rahimi & Recht, "Random features for large-scale kernel machines" (2007).

    >>> features = fourier_features(4096, inputs=2, gamma=0.5, seed=0)
    >>> first, second = features(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> round(float(first @ second), 1), round(math.exp(-0.5 * 2), 1)
    (0.4, 0.4)
    """
    generator = seeded("random Fourier features", seed)
    frequencies = math.sqrt(2 * gamma) * torch.randn(inputs, size, generator=generator)
    phases = 2 * math.pi * torch.rand(size, generator=generator)
    return lambda x: math.sqrt(2 / size) * torch.cos(torch.addmm(phases, x.flatten(1), frequencies))
