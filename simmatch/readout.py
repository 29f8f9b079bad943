"""Readouts: class scores from the label weights V, and classifiers trained on frozen features.

`decode` is local and trains no classifier: the column of V nearest to the activity gives the class. The other readouts
use standardised features. Ridge regression uses torch, which releases the interpreter's lock while it solves, unlike
scipy, so that other threads of the process keep running. Logistic regression and nearest neighbours use scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from simmatch.extras import extra
from simmatch.labels import distinct
from simmatch.moments import ROWS, Moments

ReadoutName = Literal["ridge", "logistic", "knn"]

LOGISTIC_STRENGTH = 40.0
"""C of the logistic readout times the number of images, that is the weight of the data term relative to the penalty.
Chosen on 5,000 held-out training images of Fashion-MNIST, where 20 to 60 gave the same accuracy."""

RIDGE = 0.01
"""λ of the ridge readout, for standardised features."""

NEIGHBOURS = 10
"""Number of neighbours of the readout `knn`."""


def decode(activity: Tensor, label: Tensor) -> Tensor:
    """Class scores v_c · ȳ − ½ ‖v_c‖². Their argmax is the column of V nearest to ȳ.

    Parameters
    ----------
    activity: [B, K], ȳ, the mean over positions of the label-free activities.
    label: [K, num_classes], V.

    Returns
    -------
    [B, num_classes]

    >>> decode(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), label=torch.eye(2)).argmax(dim=1)
    tensor([0, 1])
    """
    return activity @ label - 0.5 * label.square().sum(dim=0)


class Readout(Protocol):
    """A classifier of features that has been fitted.

    >>> readout: Readout = fit_ridge(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([3, 3, 7]))
    """

    def predict(self, features: Tensor) -> Tensor:
        """Labels [N] of features [N, F]."""
        ...


@dataclass(frozen=True)
class LinearClassifier:
    """Scores Aᵀ (φ − m) / s + b of features φ; the label is that of the largest.

    Attributes
    ----------
    classes: [classes], the distinct labels, ascending.
    mean, deviation: [F], m and s.
    matrix: [F, classes], A.
    bias: [classes], b.

    >>> readout = LinearClassifier(torch.tensor([3, 7]), *map(torch.tensor, ([5.0], [2.0], [[-1.0, 1.0]], [0.0, 0.0])))
    >>> readout.scores(torch.tensor([[1.0], [7.0]])).tolist(), readout.predict(torch.tensor([[1.0], [7.0]])).tolist()
    ([[2.0, -2.0], [-1.0, 1.0]], [3, 7])
    """

    classes: Tensor
    mean: Tensor
    deviation: Tensor
    matrix: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, classes: Tensor, features: int, device: torch.device) -> LinearClassifier:
        """One of this size, to be filled."""
        shapes: list[tuple[int, ...]] = [(features,), (features,), (features, len(classes)), (len(classes),)]
        values = (torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(classes.to(device), *values)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """All but the classes, in float64."""
        return self.mean, self.deviation, self.matrix, self.bias

    def scores(self, features: Tensor) -> Tensor:
        """Scores [N, classes] of features [N, F]."""
        parts = [(part - self.mean) / self.deviation @ self.matrix for part in torch.split(features, ROWS)]
        return torch.cat(parts) + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Labels [N]."""
        return self.classes[self.scores(features).argmax(dim=1)]


def fit_ridge(features: Tensor, labels: Tensor, penalty: float = RIDGE) -> LinearClassifier:
    """Ridge regression on ±1 targets, in float64.

    Minimises ⟨‖Aᵀφ − t‖²⟩ + λ‖A‖² over A, with φ the standardised features, t the centred targets and ⟨·⟩ the mean over
    images: A = (⟨φφᵀ⟩ + λI)⁻¹ ⟨φtᵀ⟩ (`ridge_of_moments`), or the equal Φ (ΦᵀΦ/N + λI)⁻¹ T/N where there are fewer
    images than features. Source: Hoerl & Kennard (1970).

    Parameters
    ----------
    features: [N, F].
    labels: [N].
    penalty: λ.

    Raises
    ------
    ValueError
        The labels have fewer than two classes.

    >>> features, labels = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([3, 3, 7, 7])
    >>> ridge = fit_ridge(features, labels)
    >>> ridge.scores(features).shape, ridge.predict(features).tolist()
    (torch.Size([4, 2]), [3, 3, 7, 7])
    """
    count, size = features.shape
    classes = distinct(labels)
    if count >= size:
        moments = Moments(size + len(classes), features.device)
        for part, some in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
            moments.add(with_targets(part, some, classes))
        return ridge_of_moments(moments, classes, penalty)
    check_classes(classes)
    targets = _targets(labels, classes).double()
    bias = targets.mean(dim=0)
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    scaled = (features.double() - mean) / deviation
    dual = solve_ridge(scaled @ scaled.T / count, (targets - bias) / count, penalty)
    return LinearClassifier(classes, mean, deviation, scaled.T @ dual, bias)


def ridge_of_moments(moments: Moments, classes: Tensor, penalty: float = RIDGE) -> LinearClassifier:
    """The ridge regression of `fit_ridge` from sums over images, whose scatter is overwritten.

    Parameters
    ----------
    moments: of `with_targets`.
    classes: [classes], ascending.
    penalty: λ.

    >>> features, labels = torch.rand(20, 3), torch.arange(20) % 2
    >>> moments = Moments(3 + 2)
    >>> for part in range(0, 20, 5):
    ...     moments.add(with_targets(features[part : part + 5], labels[part : part + 5], torch.arange(2)))
    >>> ridge = ridge_of_moments(moments, torch.arange(2))
    >>> torch.allclose(ridge.matrix, fit_ridge(features, labels).matrix)
    True
    """
    check_classes(classes)
    size = len(moments.mean) - len(classes)
    products = moments.scatter.div_(moments.count)[:size]
    gram, right = products[:, :size], products[:, size:]
    deviation = gram.diagonal().sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    gram /= deviation[:, None]
    gram /= deviation
    matrix = solve_ridge(gram, right / deviation[:, None], penalty)
    return LinearClassifier(classes, moments.mean[:size], deviation, matrix, moments.mean[size:])


def with_targets(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Features [N, F] with their targets, ±1 for each class, beside them: [N, F + classes].

    >>> with_targets(torch.zeros(2, 1), torch.tensor([7, 3]), torch.tensor([3, 7])).tolist()
    [[0.0, -1.0, 1.0], [0.0, 1.0, -1.0]]
    """
    return torch.cat([features, _targets(labels, classes).to(features)], dim=1)


def _targets(labels: Tensor, classes: Tensor) -> Tensor:
    return 2 * (labels.unsqueeze(1) == classes).long() - 1


def check_classes(classes: Tensor) -> None:
    """Raise ValueError unless there are at least two classes.

    >>> check_classes(torch.tensor([4]))
    Traceback (most recent call last):
    ValueError: labels: expected at least 2 classes, got [4]
    """
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got {classes.tolist()}")


def solve_ridge(matrix: Tensor, right: Tensor, penalty: float) -> Tensor:
    """(matrix + penalty I)⁻¹ right for a symmetric positive semidefinite matrix, which is overwritten.

    Parameters
    ----------
    matrix: [n, n].
    right: [n, m].
    penalty: λ > 0.

    >>> solve_ridge(torch.eye(2), torch.tensor([[2.0], [4.0]]), penalty=1.0).flatten()
    tensor([1., 2.])
    """
    matrix.diagonal().add_(penalty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


class Neighbours:
    """The majority of the `NEIGHBOURS` training images with the smallest cosine distance, by scikit-learn.

    >>> Neighbours(torch.eye(20), torch.arange(20) % 2).predict(torch.eye(20)).shape
    torch.Size([20])
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        with extra("eval"):
            from sklearn.neighbors import KNeighborsClassifier
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

        if len(features) < NEIGHBOURS:
            raise ValueError(f"knn: expected at least {NEIGHBOURS} images, got {len(features)}")
        model = make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors=NEIGHBOURS, metric="cosine"))
        self._model = model.fit(features.numpy(), labels.numpy())

    def predict(self, features: Tensor) -> Tensor:
        """Labels [N] of features [N, F]."""
        return torch.from_numpy(self._model.predict(features.numpy()))


def _fit_logistic(features: Tensor, labels: Tensor) -> LinearClassifier:
    with extra("eval"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    model = LogisticRegression(C=LOGISTIC_STRENGTH / len(features), max_iter=200, tol=1e-3)
    model.fit(scaler.fit_transform(features.numpy()), labels.numpy())
    matrix, bias = torch.from_numpy(model.coef_).double().T, torch.from_numpy(model.intercept_).double()
    if len(model.classes_) == 2:  # one score, positive for the second class
        matrix, bias = (torch.cat([torch.zeros_like(one), one], dim=-1) for one in (matrix, bias))
    return LinearClassifier(
        torch.from_numpy(model.classes_), torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_), matrix, bias
    )


def fit_readout(name: ReadoutName, features: Tensor, labels: Tensor) -> Readout:
    """Fit a readout of features [N, F] and labels [N].

    Parameters
    ----------
    name: `ridge`, closed-form least squares on ±1 targets; `logistic`, multinomial, by L-BFGS; `knn`, 10 nearest
        neighbours by cosine distance. The first two are a `LinearClassifier`.
    features: [N, F].
    labels: [N].

    Raises
    ------
    ValueError
        The name is unknown, or there are too few images or classes.
    ImportError
        The readout is not `ridge`, and scikit-learn is not installed.

    >>> features, labels = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
    >>> fit_readout("ridge", features, labels).predict(features).tolist()
    [0, 0, 1, 1]
    """
    fits: dict[str, Callable[[Tensor, Tensor], Readout]] = {
        "ridge": fit_ridge,
        "logistic": _fit_logistic,
        "knn": Neighbours,
    }
    if name not in fits:
        raise ValueError(f"readout: expected one of {', '.join(get_args(ReadoutName))}, got {name!r}")
    return fits[name](features.cpu(), labels.cpu())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The fraction of rows of scores [N, num_classes] whose argmax equals the label [N].

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    0.5
    """
    return float((torch.argmax(scores, dim=1) == labels).double().mean())
