"""Readouts at a label budget: closed-form ridge, logistic regression, nearest neighbours; the same for every learner.

Features are pooled, nonnegative activities. A readout first raises them to a power (1, or ½, which keeps a few large
activities from deciding), subtracts the mean of its training images and divides by one number, so that the mean squared
norm is 1. Power and penalty are chosen on held-out images; the test images are read once, by the chosen readout.

The ridge readout minimises ⟨‖Aφ − t‖²⟩ + λ‖A‖² over A, t = ±1 targets centred, ⟨·⟩ the mean over labelled images, from
sums alone where images outnumber features, else by the kernel matrix of the images. Source: Hoerl & Kennard (1970).
Logistic regression is read beside it where labels are many: there it is the better linear readout, and costs most.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from simmatch.labels import check_labels, one_hot
from simmatch.readout import accuracy, solve_ridge

POWERS = (1.0, 0.5)
"""Exponents that features may be raised to."""

PENALTIES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""λ that a ridge readout may choose from; features have a mean squared norm of 1."""

LOGISTIC_PENALTIES = (3e-6, 1e-6)
"""λ that a logistic readout may choose from; the stronger first, where the next begins."""

LOGISTIC_ITERATIONS = 100
"""Of L-BFGS, for each penalty."""

ROWS = 8192
"""Images multiplied at a time."""


@dataclass(frozen=True)
class Scaling:
    """φ = (f^power − mean) / scale; features are nonnegative up to rounding.

    Attributes
    ----------
    mean: [F]; scale: square root of the mean squared norm of the centred features.
    """

    power: float
    mean: Tensor
    scale: float

    def __call__(self, features: Tensor) -> Tensor:
        return (raised(features, self.power) - self.mean) / self.scale


def raised(features: Tensor, power: float) -> Tensor:
    """f^power of features [N, F], clamped at zero first; f itself for a power of 1."""
    return features if power == 1.0 else features.clamp(min=0.0).pow(power)


def scaling_of(features: Tensor, power: float) -> Scaling:
    """The scaling of features [N, F] to mean 0 and mean squared norm 1."""
    values = raised(features, power)
    mean = values.mean(dim=0)
    squared = float((values - mean).square().sum(dim=1).mean())
    return Scaling(power, mean, max(squared, torch.finfo(features.dtype).tiny) ** 0.5)


@dataclass(frozen=True)
class LinearReadout:
    """A linear readout: scores = φ(f) A + b.

    Attributes
    ----------
    matrix: [F, classes]; bias: [classes]; penalty: λ.
    """

    scaling: Scaling
    matrix: Tensor
    bias: Tensor
    penalty: float

    def scores(self, features: Tensor) -> Tensor:
        """[N, classes]."""
        return torch.cat([self.of_scaled(self.scaling(part)) for part in torch.split(features, ROWS)])

    def of_scaled(self, scaled: Tensor) -> Tensor:
        """[N, classes] of φ [N, F]."""
        return scaled @ self.matrix + self.bias

    @property
    def parameters(self) -> int:
        return self.matrix.numel() + self.bias.numel()


def ridge_path(
    features: Tensor, labels: Tensor, num_classes: int, *, power: float = 1.0, penalties: Sequence[float] = PENALTIES
) -> list[LinearReadout]:
    """Linear readouts of features [N, F] and labels [N], one for every penalty.

    Raises
    ------
    ValueError
        A label out of range.
    """
    scaling = scaling_of(features, power)
    check_labels(labels, num_classes, len(features))
    targets = one_hot(labels, num_classes, features).T.contiguous()  # its layout decides how sums round
    bias = targets.mean(dim=0)
    centred = targets - bias
    solve = _by_kernel if len(features) <= features.shape[1] else _by_sums
    return [
        LinearReadout(scaling, matrix, bias, penalty)
        for matrix, penalty in zip(solve(features, centred, scaling, penalties), penalties, strict=True)
    ]


def _by_sums(features: Tensor, targets: Tensor, scaling: Scaling, penalties: Sequence[float]) -> list[Tensor]:
    """A = (⟨φφᵀ⟩ + λ)⁻¹ ⟨φ tᵀ⟩, a factorisation each."""
    count, size = features.shape
    gram, right = features.new_zeros(size, size), features.new_zeros(size, targets.shape[1])
    for part, target in zip(torch.split(features, ROWS), torch.split(targets, ROWS), strict=True):
        scaled = scaling(part)
        gram.addmm_(scaled.T, scaled, alpha=1 / count)
        right.addmm_(scaled.T, target, alpha=1 / count)
    return [solve_ridge(gram.clone(), right, penalty) for penalty in penalties]


def _by_kernel(features: Tensor, targets: Tensor, scaling: Scaling, penalties: Sequence[float]) -> list[Tensor]:
    """A = φᵀ (φφᵀ + Nλ)⁻¹ t, all penalties from one decomposition, in float64."""
    scaled = scaling(features)
    values, vectors = torch.linalg.eigh((scaled @ scaled.T).double())
    projected = vectors.T @ targets.double()
    count = len(features)
    return [
        scaled.T @ (vectors @ (projected / (values.clamp(min=0.0) + count * penalty)[:, None])).to(features.dtype)
        for penalty in penalties
    ]


def logistic_path(
    features: Tensor, labels: Tensor, num_classes: int, scaling: Scaling, *, penalties: Sequence[float]
) -> list[LinearReadout]:
    """Logistic readouts of features [N, F] and labels [N], one for every penalty, each begun where the last ended.

    Multinomial, by scikit-learn's L-BFGS. A class without images is never answered.

    Raises
    ------
    ValueError
        A label out of range, or images of fewer than three classes.
    """
    check_labels(labels, num_classes, len(features))
    present = torch.unique(labels)
    if len(present) < 3:
        raise ValueError(f"labels: expected at least 3 classes, got {present.tolist()}")
    scaled, targets = scaling(features).numpy(), labels.numpy()
    model = LogisticRegression(max_iter=LOGISTIC_ITERATIONS, tol=1e-5, warm_start=True)
    readouts = []
    for penalty in penalties:
        model.set_params(C=1 / (penalty * len(labels)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # iterations are bounded; the choice is by accuracy
            model.fit(scaled, targets)
        matrix = features.new_zeros(features.shape[1], num_classes)
        bias = features.new_full((num_classes,), -math.inf)
        matrix[:, present] = torch.from_numpy(model.coef_.T).to(features.dtype)
        bias[present] = torch.from_numpy(model.intercept_).to(features.dtype)
        readouts.append(LinearReadout(scaling, matrix, bias, penalty))
    return readouts


def choose(readouts: Iterable[LinearReadout], held_out: tuple[Tensor, Tensor]) -> tuple[LinearReadout, float]:
    """The readout that is best on held-out (features, labels), and its accuracy there; of equals the stronger penalty.

    Raises
    ------
    ValueError
        No readouts.
    """
    judged = []
    for _, group in groupby(readouts, key=lambda each: id(each.scaling)):
        path = list(group)
        parts = [
            [each.of_scaled(scaled) for each in path]
            for scaled in map(path[0].scaling, torch.split(held_out[0], ROWS))  # scaled once: most of the time
        ]
        for each, scores in zip(path, zip(*parts, strict=True), strict=True):
            judged.append((accuracy(torch.cat(scores), held_out[1]), each))
    right, best = max(judged, key=lambda pair: (pair[0], pair[1].penalty))
    return best, right


def choose_ridge(
    labelled: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], num_classes: int
) -> tuple[LinearReadout, float]:
    """The ridge readout of labelled (features, labels) that is best on held-out images, and its accuracy there."""
    return choose(chain.from_iterable(ridge_path(*labelled, num_classes, power=power) for power in POWERS), held_out)


def neighbours_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, *, count: int = 10
) -> float:
    """Accuracy of the vote of the `count` nearest training images by cosine of the centred features' square roots."""
    scaling = scaling_of(train[0], 0.5)
    keys = F.normalize(scaling(train[0]), dim=1)
    right = 0
    for features, labels in zip(torch.split(test[0], 1000), torch.split(test[1], 1000), strict=True):
        nearest = (F.normalize(scaling(features), dim=1) @ keys.T).topk(min(count, len(keys)), dim=1).indices
        votes = F.one_hot(train[1][nearest], num_classes).sum(dim=1)
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test[1])
