"""Label-free activity by class, from sums that fade: what V is scaled to, for scores and for a stack that is saved.

    C ← (1 − η) C + Σ w ȳ zᵀ,   n ← (1 − η) n + Σ w z     class means C / n

V learns from activities that labels may drive; scores compare it with activities that they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmatch.labels import one_hot
from simmatch.plasticity import settled_label
from simmatch.readout import decode

LEAST = 1e-20
"""n_c below which a class does not fade any further: one that stays away for long keeps its mean."""


class LabelSums:
    """Sums of the activities of a layer, and of its labels.

    Parameters
    ----------
    label: [K, num_classes], all rows of V, whose dtype and device the sums have.
    rate: η, by which they fade with each batch that has a label.

    Attributes
    ----------
    yz, zz: [K, num_classes], C, and [num_classes], n.

    >>> sums = LabelSums(torch.eye(2), rate=0.1)
    >>> sums.add(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, -1]))
    >>> sums.scores(torch.eye(2), torch.tensor([[3.0, 0.0]]))
    tensor([[4.5000,   -inf]])
    """

    def __init__(self, label: Tensor, rate: float) -> None:
        self.yz, self.zz, self._rate = torch.zeros_like(label), label.new_zeros(label.shape[1]), rate

    def add(self, activity: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add mean activities ȳ [B, K] of records with labels [B], `UNLABELLED` where unknown, and weights [B]."""
        z = one_hot(labels, len(self.zz), activity)
        weighted = z if weights is None else z * weights.to(z)
        keep = torch.where(self.zz > LEAST, 1.0 - self._rate, 1.0).to(self.zz)
        self.yz = keep * self.yz + activity.T @ weighted.T
        self.zz = keep * self.zz + weighted.sum(dim=1)

    def scores(self, label: Tensor, activity: Tensor) -> Tensor | None:
        """Scores [B, num_classes] of activities [B, K] by V [K, num_classes], −inf for classes that have not been seen;
        None if none has."""
        seen = self.zz > 0
        if not bool(seen.any()):
            return None
        return decode(activity, settled_label(label, self.yz, self.zz.diag())).masked_fill(~seen, -torch.inf)

    def grow(self, classes: int) -> None:
        """Have room for classes 0 … `classes` − 1."""
        added = classes - len(self.zz)
        self.yz, self.zz = (torch.nn.functional.pad(each, (0, added)) for each in (self.yz, self.zz))

    def restore(self, yz: Tensor, zz: Tensor) -> None:
        """Set what `yz` and `zz` were."""
        self.yz, self.zz = yz.to(self.yz).clone(), zz.to(self.zz).clone()
