"""What the features are worth: label decoding from V, and readouts trained on frozen features.

`decode` is entirely local: the column of V nearest to the activity names the class, no classifier is trained.
The others read standardised features: ridge by torch, which releases the interpreter's lock while it solves (scipy's
solver holds it, and nobody in the process is served meanwhile); logistic regression and neighbours by scikit-learn.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simmatch.extras import extra
from simmatch.geometry import covariance

ReadoutName = Literal["ridge", "logistic", "knn"]

LOGISTIC_STRENGTH = 40.0
"""C of the logistic readout times the number of images: the data term's weight per unit of penalty. Chosen on 5,000
held-out training images of Fashion-MNIST, where 20 to 60 did equally well."""


RIDGE = 0.01
"""λ of the ridge readout, over standardised features."""

ROWS = 2048
"""Images converted to float64 at a time."""


def decode(activity: Tensor, label: Tensor) -> Tensor:
    """Scores v_c · ȳ − ½ ‖v_c‖², whose argmax is the column of V nearest to ȳ.

    Parameters
    ----------
    activity: [B, K], ȳ, the mean over positions of the label-free activities.
    label: [K, num_classes], V.

    Returns
    -------
    [B, num_classes]
    """
    return activity @ label - 0.5 * label.square().sum(dim=0)


class Ridge:
    """min over A of ⟨‖Aᵀφ − t‖²⟩ + λ‖A‖²: φ standardised features, t centred ±1 targets, ⟨·⟩ the mean over images.

    A = (⟨φφᵀ⟩ + λ)⁻¹ ⟨φtᵀ⟩, or with fewer images than features Φ (ΦᵀΦ/N + λ)⁻¹ T/N, the same. In float64.
    Source: Hoerl & Kennard (1970).

    Attributes
    ----------
    classes: [classes], the labels that there are; matrix: [F, classes]; bias: [classes].

    Raises
    ------
    ValueError
        Labels of fewer than two classes.
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
                right += part.double().T @ target  # centred targets: the mean needs no subtraction
            gram /= self._deviation[:, None]
            gram /= self._deviation
            self.matrix = solve_ridge(gram, right / self._deviation[:, None] / count, penalty)

    def scores(self, features: Tensor) -> Tensor:
        """[N, classes]."""
        parts = [(part - self._mean) / self._deviation @ self.matrix for part in torch.split(features, ROWS)]
        return torch.cat(parts) + self.bias

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Labels [N]."""
        predicted: NDArray[Any] = self.classes[self.scores(torch.from_numpy(features)).argmax(dim=1)].numpy()
        return predicted

    def score(self, features: NDArray[Any], labels: NDArray[Any]) -> float:
        """Accuracy."""
        return float(np.mean(self.predict(features) == labels))


def solve_ridge(matrix: Tensor, right: Tensor, penalty: float) -> Tensor:
    """(matrix + penalty I)⁻¹ right for a symmetric positive semidefinite matrix, which is overwritten."""
    matrix.diagonal().add_(penalty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def fit_readout(name: ReadoutName, features: Tensor, labels: Tensor) -> Any:
    """A fitted readout of features [N, F] and labels [N] with scikit-learn's `predict` and `score`, on arrays.

    ridge: closed-form least squares on ±1 targets; logistic: multinomial, L-BFGS; knn: 10 neighbours by cosine.

    Raises
    ------
    ValueError
        Unknown name.
    ImportError
        Another than ridge, without the extra `eval`.
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
    """Share of rows of scores [N, num_classes] whose argmax is the label [N]."""
    return float((torch.argmax(scores, dim=1) == labels).double().mean())
