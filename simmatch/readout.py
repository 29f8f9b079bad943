"""Readouts: class scores from the label weights V, and classifiers trained on frozen features.

`decode` is local and trains no classifier: the column of V nearest to the activity gives the class. The other readouts
use standardised features. Ridge regression uses torch, which releases the interpreter's lock while it solves, unlike
scipy, so that other threads of the process keep running. Logistic regression and nearest neighbours use scikit-learn.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simmatch.extras import extra
from simmatch.whitening import covariance

ReadoutName = Literal["ridge", "logistic", "knn"]

LOGISTIC_STRENGTH = 40.0
"""C of the logistic readout times the number of images, that is the weight of the data term relative to the penalty.
Chosen on 5,000 held-out training images of Fashion-MNIST, where 20 to 60 gave the same accuracy."""

RIDGE = 0.01
"""λ of the ridge readout, for standardised features."""

ROWS = 2048
"""Number of images converted to float64 at a time."""


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


class Ridge:
    """Ridge regression on ±1 targets, fitted by its constructor in float64.

    Minimises ⟨‖Aᵀφ − t‖²⟩ + λ‖A‖² over A, with φ the standardised features, t the centred targets and ⟨·⟩ the mean over
    images: A = (⟨φφᵀ⟩ + λI)⁻¹ ⟨φtᵀ⟩, or the equal Φ (ΦᵀΦ/N + λI)⁻¹ T/N where there are fewer images than features.
    Source: Hoerl & Kennard (1970).

    Parameters
    ----------
    features: [N, F].
    labels: [N].
    penalty: λ.

    Attributes
    ----------
    classes: the distinct labels, ascending.
    matrix: [F, classes], A.
    bias: [classes], means of the targets.

    Raises
    ------
    ValueError
        The labels have fewer than two classes.

    >>> features, labels = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([3, 3, 7, 7])
    >>> ridge = Ridge(features, labels)
    >>> ridge.scores(features).shape, ridge.predict(features.numpy()).tolist()
    (torch.Size([4, 2]), [3, 3, 7, 7])
    """

    def __init__(self, features: Tensor, labels: Tensor, penalty: float = RIDGE) -> None:
        count, size = features.shape
        self.classes, indices = torch.unique(labels, return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError(f"ridge: expected labels of at least 2 classes, got {self.classes.tolist()}")
        targets = 2.0 * F.one_hot(indices, len(self.classes)).double() - 1.0
        self.bias = targets.mean(dim=0)
        targets -= self.bias
        if count < size:
            self._mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
            self._deviation = torch.where(deviation > 0, deviation, 1.0)
            scaled = (features.double() - self._mean) / self._deviation
            self.matrix = scaled.T @ solve_ridge(scaled @ scaled.T / count, targets / count, penalty)
        else:
            self._mean, gram = covariance(features)
            deviation = gram.diagonal().sqrt()
            self._deviation = torch.where(deviation > 0, deviation, 1.0)
            right = gram.new_zeros(size, len(self.classes))
            for part, target in zip(torch.split(features, ROWS), torch.split(targets, ROWS), strict=True):
                right += (
                    part.double().T @ target
                )  # the targets are centred: subtracting the mean of the features would change nothing
            gram /= self._deviation[:, None]
            gram /= self._deviation
            self.matrix = solve_ridge(gram, right / self._deviation[:, None] / count, penalty)

    def scores(self, features: Tensor) -> Tensor:
        """Scores [N, classes] of features [N, F]."""
        parts = [(part - self._mean) / self._deviation @ self.matrix for part in torch.split(features, ROWS)]
        return torch.cat(parts) + self.bias

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Labels [N]."""
        predicted: NDArray[Any] = self.classes[self.scores(torch.from_numpy(features)).argmax(dim=1)].numpy()
        return predicted

    def score(self, features: NDArray[Any], labels: NDArray[Any]) -> float:
        """Accuracy on features [N, F] with labels [N]."""
        return float(np.mean(self.predict(features) == labels))


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


def fit_readout(name: ReadoutName, features: Tensor, labels: Tensor) -> Any:
    """Fit a readout of features [N, F] and labels [N].

    Parameters
    ----------
    name: `ridge`, closed-form least squares on ±1 targets; `logistic`, multinomial, by L-BFGS; `knn`, 10 nearest
        neighbours by cosine distance.
    features: [N, F].
    labels: [N].

    Returns
    -------
    A model with scikit-learn's methods `predict` and `score`, which take numpy arrays.

    Raises
    ------
    ValueError
        The name is unknown.
    ImportError
        The readout is not `ridge`, and scikit-learn is not installed.

    >>> features, labels = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
    >>> fit_readout("ridge", features, labels).score(features.numpy(), labels.numpy())
    1.0
    """
    if name == "ridge":
        return Ridge(features.cpu(), labels.cpu())
    with extra("eval"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    makers = {
        "logistic": lambda: LogisticRegression(C=LOGISTIC_STRENGTH / features.shape[0], max_iter=200, tol=1e-3),
        "knn": lambda: KNeighborsClassifier(n_neighbors=10, metric="cosine"),
    }
    if name not in makers:
        raise ValueError(f"readout: expected one of {', '.join(get_args(ReadoutName))}, got {name!r}")
    model = make_pipeline(StandardScaler(), makers[name]())
    return model.fit(features.cpu().numpy(), labels.cpu().numpy())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The fraction of rows of scores [N, num_classes] whose argmax equals the label [N].

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    0.5
    """
    return float((torch.argmax(scores, dim=1) == labels).double().mean())
