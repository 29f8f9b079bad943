"""What the features are worth: label decoding from V, and readouts trained on frozen features.

`decode` is entirely local: the column of V nearest to the activity names the class, no classifier is trained.
The others are scikit-learn's, on standardised features.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

ReadoutName = Literal["ridge", "logistic", "knn"]
READOUTS: tuple[str, ...] = get_args(ReadoutName)


LOGISTIC_STRENGTH = 40.0
"""C of the logistic readout times the number of images: the data term's weight per unit of penalty. Chosen on 5,000
held-out training images of Fashion-MNIST, where 20 to 60 did equally well."""


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


def fit_readout(name: ReadoutName, features: Tensor, labels: Tensor) -> Any:
    """A fitted scikit-learn pipeline on features [N, F] and labels [N]: `predict`, `score`.

    ridge: closed-form least squares on ±1 targets; logistic: multinomial, L-BFGS; knn: 10 neighbours by cosine.

    Raises
    ------
    ValueError
        Unknown name.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    makers = {
        "ridge": lambda: RidgeClassifier(alpha=0.01 * features.shape[0], solver="cholesky"),
        "logistic": lambda: LogisticRegression(C=LOGISTIC_STRENGTH / features.shape[0], max_iter=200, tol=1e-3),
        "knn": lambda: KNeighborsClassifier(n_neighbors=10, metric="cosine"),
    }
    if name not in makers:
        raise ValueError(f"readout: expected one of {', '.join(makers)}, got {name!r}")
    model = make_pipeline(StandardScaler(), makers[name]())
    return model.fit(features.cpu().numpy(), labels.cpu().numpy())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of scores [N, num_classes] whose argmax is the label [N]."""
    return float((torch.argmax(scores, dim=1) == labels).double().mean())
