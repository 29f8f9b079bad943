"""Rows with a head of their own: an adaptive random forest, and a small network trained by backpropagation."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.benchmarks.stream.rows import NO_CLASS
from jobs.benchmarks.stream.streams import Stream
from simmatch.extras import extra
from simmatch.labels import UNLABELLED
from simmatch.seeding import seeded

KERNELS = (64, 9)
"""Samples of the filters of the two convolutions of the network for signals; less where windows are shorter."""


class AdaptiveForest:
    """river's adaptive random forest on given features, record by record.

    Parameters
    ----------
    function: records [B, C, H, W] → features [B, F].
    models: trees.
    drifts: whether a tree is replaced when its errors grow.
    seed: of the forest.

    Source: Gomes et al., "Adaptive random forests for evolving data stream classification" (2017).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], models: int, drifts: bool, seed: int) -> None:
        with extra("stream"):
            from river.drift import NoDrift
            from river.forest import ARFClassifier

        detector = None if drifts else NoDrift()  # type: ignore[no-untyped-call]  # None: ADWIN
        self.function = function
        self.forest = ARFClassifier(n_models=models, drift_detector=detector, warning_detector=detector, seed=seed)

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`."""
        classes = [self.forest.predict_one(record) for record in self._records(x)]
        return torch.tensor([NO_CLASS if each is None else int(each) for each in classes])

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`; only labelled records are learnt from."""
        given = labels != UNLABELLED
        for record, label in zip(self._records(x[given]), labels[given].tolist(), strict=True):
            self.forest.learn_one(record, label)

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn(x, labels)

    def end_segment(self, number: int) -> None:
        """Nothing."""

    @property
    def nbytes(self) -> int:
        """As pickle writes it; in memory it takes more."""
        return len(pickle.dumps(self.forest))

    def _records(self, x: Tensor) -> list[dict[Hashable, Any]]:
        return [dict(enumerate(values)) for values in self.function(x).tolist()] if len(x) else []


@dataclass(frozen=True)
class NetworkSettings:
    """How the network learns a stream.

    Attributes
    ----------
    lr: of AdamW.
    steps: for each batch that has a label, or for every batch once records are kept.
    channels: of the two convolutions.
    replay: labelled records that are kept, a uniform sample of all.
    epochs: passes over the labelled records of the warm-up, in any order, when it ends. Without them a network that
        is fine-tuned has learnt too little by then to choose its settings by.
    """

    lr: float = 1e-3
    steps: int = 1
    channels: tuple[int, int] = (32, 64)
    replay: int = 0
    epochs: int = 20


class Network:
    """A small convolutional network that is fine-tuned by backpropagation: a `Row`, and `Features` for the readout.

    Parameters
    ----------
    net: records → features; its last layer is followed by a linear head.
    features: number of features.
    classes: of the head.
    """

    def __init__(self, net: nn.Module, features: int, classes: int, settings: NetworkSettings, seed: int) -> None:
        self.net, self.head, self.settings = net, nn.Linear(features, classes), settings
        generator = seeded("network", seed)
        for values in (*net.parameters(), *self.head.parameters()):
            fan_in = values[0].numel() if values.ndim > 1 else 0
            with torch.no_grad():
                if fan_in:
                    values.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                else:
                    values.zero_()
        self.parameters = [*net.parameters(), *self.head.parameters()]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.met, self.generator = 0, seeded("replay", seed)
        self._warm_up: list[tuple[Tensor, Tensor]] | None = []  # until it ends

    def encode(self, x: Tensor) -> Tensor:
        """See `Features`."""
        features: Tensor = self.net(x)
        return features

    def predict(self, x: Tensor) -> Tensor:
        """See `Row`: by its own head."""
        if self.met == 0:
            return torch.full((len(x),), NO_CLASS)
        classes: Tensor = self.head(self.net(x)).argmax(dim=1)
        return classes

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`: from labelled records, and from those that are kept, also where a batch has no label."""
        given = labels != UNLABELLED
        x, labels = x[given], labels[given]
        self.met += len(x)
        for _ in range(self.settings.steps if len(x) or self.kept else 0):
            self._step(*self._drawn(x, labels))
        self._keep(x, labels)
        if self._warm_up is not None and len(x):
            self._warm_up.append((x, labels))

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """See `Row`."""
        self.learn(x, labels)

    def end_segment(self, number: int) -> bool:
        """See `Features`: after the warm-up, passes over what was labelled in it."""
        known, self._warm_up = self._warm_up, None
        if not known:
            return False
        x, labels = (torch.cat(list(each)) for each in zip(*known, strict=True))
        for _ in range(self.settings.epochs):
            for part in torch.split(torch.randperm(len(x), generator=self.generator), PRE_TRAINED):
                self._step(x[part], labels[part])
        return True

    @property
    def nbytes(self) -> int:
        """Weights, two moments of each, and what is kept for replay."""
        kept = sum(x.nbytes + label.nbytes for x, label in self.kept)
        return 3 * sum(values.nbytes for values in self.parameters) + kept

    def _step(self, x: Tensor, labels: Tensor) -> None:
        with torch.enable_grad():
            loss = F.cross_entropy(self.head(self.net(x)), labels)
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()

    def _drawn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labelled records of a batch, and as many that are kept beside them, at least `REPLAYED`."""
        if not self.kept:
            return x, labels
        count = max(len(x), REPLAYED)
        chosen = torch.randint(len(self.kept), (count,), generator=self.generator).tolist()
        others = [self.kept[index] for index in chosen]
        kept_x, kept_labels = (torch.stack(list(each)) for each in zip(*others, strict=True))
        return torch.cat([x, kept_x]), torch.cat([labels, kept_labels])

    def _keep(self, x: Tensor, labels: Tensor) -> None:
        """A uniform sample of all labelled records (Vitter's algorithm R, 1985)."""
        for number, pair in enumerate(zip(x, labels, strict=True), start=self.met - len(x)):
            if len(self.kept) < self.settings.replay:
                self.kept.append(pair)
            elif self.settings.replay:
                place = int(torch.randint(number + 1, (1,), generator=self.generator))
                if place < self.settings.replay:
                    self.kept[place] = pair


REPLAYED = 32
"""Least number of kept records that go with a step."""

PRE_TRAINED = 50
"""Records of a step of the passes over the warm-up."""


def signal_network(stream: Stream, settings: NetworkSettings, seed: int) -> Network:
    """Two convolutions along time, each with ReLU, then means over time."""
    channels, length = stream.source.in_channels, stream.source.width
    first, second = settings.channels
    kernel = min(KERNELS[0], length // 2)
    stride = max(1, kernel // 8)
    net = nn.Sequential(
        nn.Conv2d(channels, first, (1, kernel), stride=(1, stride)),
        nn.ReLU(),
        nn.Conv2d(first, second, (1, min(KERNELS[1], (length - kernel) // stride + 1)), padding=(0, 0)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Network(net, second, stream.classes, settings, seed)
