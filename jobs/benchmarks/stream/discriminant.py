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
from simmatch.moments import Moments
from simmatch.seeding import seeded

RENEWED = 0.02
"""Growth of the number of records after which a discriminant is solved anew; and where a segment ends."""


class _ClassMeans:
    """Sums of features over the labelled records of each class; a `Row` without its prediction.

    Parameters
    ----------
    function: records [B, C, H, W] → features [B, F].
    size: F.
    classes: number of classes.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, classes: int) -> None:
        self.function = function
        self.sums = torch.zeros(classes, size, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`; only labelled records are learnt from."""
        given = labels != UNLABELLED
        if bool(given.any()):
            self._add(self.function(x[given]), labels[given])

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn(x, labels)

    def end_segment(self, number: int) -> None:
        """Nothing."""

    @property
    def nbytes(self) -> int:
        """Of sums and counts."""
        return self.sums.nbytes + self.counts.nbytes

    @property
    def means(self) -> Tensor:
        """[classes, F], in float64; zero where a class has no record yet."""
        return self.sums / self.counts.clamp(min=1.0)[:, None]

    def _add(self, features: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, features.double())
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def _largest(self, scores: Tensor) -> Tensor:
        """The class with the largest score, of those that have been seen."""
        if not bool(self.counts.any()):
            return torch.full((len(scores),), NO_CLASS)
        return torch.where(self.counts > 0, scores, -torch.inf).argmax(dim=1)


class NearestMean(_ClassMeans):
    """The class whose mean is nearest.

    >>> row = NearestMean(lambda x: x.flatten(1), size=2, classes=3)
    >>> row.learn(torch.tensor([[0.0, 0.0], [4.0, 4.0]]).reshape(2, 1, 1, 2), torch.tensor([2, 1]))
    >>> row.predict(torch.tensor([[1.0, 1.0]]).reshape(1, 1, 1, 2))
    tensor([2])
    """

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        means = self.means
        return self._largest(self.function(x).double() @ means.T - 0.5 * means.square().sum(dim=1))


class StreamingDiscriminant(_ClassMeans):
    """Linear discriminant analysis from sums.

    Parameters
    ----------
    shrinkage: ρ in [0, 1]; None: the oracle-approximating one.
    nbytes_of_function: bytes of state of `function`.

    >>> row = StreamingDiscriminant(lambda x: x.flatten(1), size=2, classes=2, shrinkage=0.1)
    >>> row.learn(torch.rand(20, 1, 1, 2) + torch.arange(20).reshape(20, 1, 1, 1) % 2, torch.arange(20) % 2)
    >>> row.predict(torch.tensor([[0.0, 0.0], [2.0, 2.0]]).reshape(2, 1, 1, 2))
    tensor([0, 1])
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], size: int, classes: int, shrinkage: float | None = None
    ) -> None:
        super().__init__(function, size, classes)
        self.shrinkage, self.moments = shrinkage, Moments(size)
        self._solved: tuple[float, Tensor, Tensor] | None = None  # records, w [F, classes], the rest of the scores

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        if self.moments.count == 0:
            return torch.full((len(x),), NO_CLASS)
        if self._solved is None or self.moments.count > (1 + RENEWED) * self._solved[0]:
            self._solved = (self.moments.count, *self._solution())
        _, weights, bias = self._solved
        return self._largest(self.function(x).double() @ weights + bias)

    def end_segment(self, number: int) -> None:
        """See `Row`: what is asked next is answered from all records so far."""
        self._solved = None

    @property
    def nbytes(self) -> int:
        """Of sums, counts and scatter; nothing else has to be kept to go on."""
        return super().nbytes + self.moments.mean.nbytes + self.moments.scatter.nbytes

    def _add(self, features: Tensor, labels: Tensor) -> None:
        super()._add(features, labels)
        self.moments.add(features)

    def covariance(self) -> Tensor:
        """Σ, [F, F]."""
        count, away = self.moments.count, self.means - self.moments.mean
        within = (self.moments.scatter - away.T @ (away * self.counts[:, None])) / count
        level = within.trace() / len(within)
        share = oracle_shrinkage(within, count) if self.shrinkage is None else self.shrinkage
        within *= 1 - share
        within.diagonal().add_(share * level)
        return within

    def _solution(self) -> tuple[Tensor, Tensor]:
        covariance, means = self.covariance(), self.means
        covariance.diagonal().add_(1e-9 * covariance.trace() / len(covariance))  # pixels that are always black
        weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))
        priors = self.counts.clamp(min=1e-9).log() - self.counts.sum().log()
        return weights, priors - 0.5 * (means.T * weights).sum(dim=0)


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
