"""A batch of a stream as the stack encodes it: what is told of it, and what the stack learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from simmatch.stage_layers import Solved


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of records as the stack encodes it, before it learns from it.

    Attributes
    ----------
    x: [B, C, H, W], the records.
    features: [B, F], input of a readout.
    signals: by name, a number of each record [B] that needs no label, of the first layer: `objective`, `residual` of
        the drive, `active`; see `simmatch.online.signals`.
    label_scores: [B, num_classes], class scores from V, −inf for classes that have not been seen; None if the last
        layer is not supervised or has seen no label.
    activity: [B, K], mean activities of the last layer.
    solved: by layer, what need not be computed again to learn.
    version: number of the weights of the stack with which this was encoded.

    >>> import torch
    >>> x, none = torch.zeros(2, 1, 1, 32), torch.zeros(2, 0)
    >>> Encoded(x, none, {}, label_scores=None, activity=none, solved={}, version=0).features.shape
    torch.Size([2, 0])
    """

    x: Tensor
    features: Tensor
    signals: dict[str, Tensor]
    label_scores: Tensor | None
    activity: Tensor
    solved: Mapping[int, Solved] = field(repr=False)
    version: int

    def told(self) -> Encoded:
        """With features, signals and scores on the host, where readouts, detectors and monitors are; the rest, from
        which the stack learns, stays on its device."""
        scores = None if self.label_scores is None else self.label_scores.cpu()
        signals = {name: values.cpu() for name, values in self.signals.items()}
        return replace(self, features=self.features.cpu(), signals=signals, label_scores=scores)
