"""Rivals on streams of images: LeNet-5, fine-tuned with or without replay, and training on all records together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.benchmarks.stream.rivals import Network, NetworkSettings
from jobs.benchmarks.stream.rows import NO_CLASS, Features
from jobs.benchmarks.stream.streams import Stream
from jobs.evaluation.lenet import LeNet
from simmatch.labels import UNLABELLED


class Joint:
    """Not online: all records are kept, and learnt from together when the last segment ends; until then no answer.

    Parameters
    ----------
    features: of records; they do not learn after the warm-up.
    fit: features [N, F] and labels [N] → (features → classes).
    segments: number of segments of the stream.
    """

    def __init__(
        self, features: Features, fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]], segments: int
    ) -> None:
        self.features, self.fit, self.segments, self.learning = features, fit, segments, True
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._fitted: Callable[[Tensor], Tensor] | None = None

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        return torch.full((len(x),), NO_CLASS) if self._fitted is None else self._fitted(self.features.encode(x))

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn_labels(x, labels)
        if self.learning:
            self.features.learn(x, labels)

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        given = labels != UNLABELLED
        self.kept.append((_pixels(x[given]), labels[given]))

    def end_segment(self, number: int) -> None:
        """See `Row`."""
        self.learning = False
        if number + 1 == self.segments:
            encoded = torch.cat([self.features.encode(x.float() / 255) for x, _ in self.kept])
            self._fitted = self.fit(encoded, torch.cat([labels for _, labels in self.kept]))

    @property
    def nbytes(self) -> int:
        """Of all records, a byte a pixel."""
        return self.features.nbytes + sum(x.nbytes + labels.nbytes for x, labels in self.kept)


class LeNetRow(Network):
    """LeNet-5, fine-tuned batch by batch; what it keeps for replay counts a byte a pixel."""

    def __init__(self, stream: Stream, settings: NetworkSettings, seed: int) -> None:
        net = LeNet(stream.source.in_channels, stream.source.image_size, stream.classes, seed=seed)
        width = net.dense[-1].in_features
        assert isinstance(width, int)
        super().__init__(_Hidden(net), width, stream.classes, settings, seed)

    @property
    def nbytes(self) -> int:
        """Weights, two moments of each, and what is kept for replay."""
        return 3 * sum(values.nbytes for values in self.parameters) + len(self.kept) * _record_bytes(self.kept)


class _Hidden(nn.Module):
    """LeNet up to its last hidden layer."""

    def __init__(self, net: LeNet) -> None:
        super().__init__()
        self.net = net
        net.dense = net.dense[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x))


def _record_bytes(kept: Sequence[tuple[Tensor, Tensor]]) -> int:
    return kept[0][0].numel() + kept[0][1].nbytes if kept else 0


def _pixels(x: Tensor) -> Tensor:
    return (255 * x).round().to(torch.uint8)
