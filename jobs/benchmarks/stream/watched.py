"""A model that learns a stream while its signals are watched: novelty and drift are measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simmatch.config import LayerConfig, ModelConfig, parse
from simmatch.model import InputConfig
from simmatch.online.drift import ERROR, Drift, DriftConfig, DriftMonitor
from simmatch.online.novelty import NoveltyConfig, NoveltyDetector
from simmatch.online.rate import RateConfig
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State, joined, part_of

BATCH = 50

LAYERS: Mapping[str, Mapping[str, object]] = {
    "bearings": {
        "out_channels": 128, "kernel_size": [1, 64], "stride": [1, 4], "whiten": True, "whiten_ridge": 0.001,
        "pool": [1, 1], "power": 0.5,
    },
    "images": {
        "out_channels": 64, "kernel_size": 5, "stride": 2, "whiten": True, "pool": 4, "power": 0.5,
    },
    "electricity": {
        "out_channels": 32, "kernel_size": [1, 4], "whiten": True, "power": 0.5,
    },
}  # fmt: skip
"""By kind of data, the layer of the model: that of `jobs/configs/bearings.yaml`, and two like it."""


@dataclass(frozen=True)
class Watching:
    """What a model does beside answering.

    Attributes
    ----------
    learns: whether layer and readout go on learning.
    weighted: whether they learn with the weights of the novelty detector.
    novelty, drift, rate: settings.
    """

    learns: bool = True
    weighted: bool = True
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    rate: RateConfig = field(default_factory=lambda: RateConfig(kind="after_drift", decay_steps=50))


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a batch before anything was learnt from it; all but drifts are [B].

    Attributes
    ----------
    errors: 1 where the readout was wrong, 0 where right, NaN without an answer.
    scores, novel: of the novelty detector; `novel` where above its threshold.
    weights: with which it is learnt from.
    drifts: found in the batch.
    """

    errors: Tensor
    scores: Tensor
    novel: Tensor
    weights: Tensor
    drifts: list[Drift]


class Watched:
    """One layer, a readout, novelty and drift.

    Parameters
    ----------
    kind: of data, see `LAYERS`.
    warm_up: records [N, C, H, W] and their labels, from which it learns first.
    seed: of the weights.
    """

    def __init__(self, kind: str, warm_up: tuple[Tensor, Tensor], seed: int, watching: Watching | None = None) -> None:
        x, labels = warm_up
        self.watching = watching or Watching()
        layer = dict(LAYERS[kind]) | {
            "train": {"positions": 16} if kind != "electricity" else {},
            "dynamics": {"exchange": "gather_state", "encode_iterations": 20},
            "plasticity": {"lr": 0.1},
        }
        model = ModelConfig(layers=(parse(LayerConfig, layer),))
        self.stack = OnlineStack(model, InputConfig.of(x, int(labels.max()) + 1), seed=seed, rate=self.watching.rate)
        self.stack.calibrate(x)
        features = self.stack.encode(x[:1]).features.shape[1]
        self.readout = OnlineReadout(features, ReadoutConfig(), seed=seed)
        self.detector = NoveltyDetector(features, self.watching.novelty)
        self.monitor = DriftMonitor(self.watching.drift)
        self.number = 0
        learning, self._learning = self.watching.learns, True
        for part in torch.split(torch.arange(len(x)), BATCH):
            self.see(x[part], labels[part])
        self._learning = learning

    def see(self, x: Tensor, labels: Tensor) -> Seen:
        """Test a batch, watch, then learn from it."""
        encoded = self.stack.encode(x)
        answers = self.readout.scores(encoded.features)
        nothing = torch.full((len(x),), torch.nan, dtype=torch.float64)
        errors = nothing if answers is None else (answers.argmax(dim=1) != labels).double()
        scores, threshold = self.detector.score(encoded.features), self.detector.threshold
        novel = torch.zeros(len(x), dtype=torch.bool) if threshold is None else scores > threshold
        weights = self.detector.weights(scores) if self.watching.weighted else torch.ones(len(x))
        drifts = self.monitor.add({ERROR: errors, "novelty": scores, **encoded.signals}, self.number)
        self.detector.learn(encoded.features, scores)
        if self._learning:
            if drifts:
                self.stack.raise_rate()
            self.stack.learn(encoded, labels, weights)
            self.readout.learn(encoded.features, labels, weights)
        self.number += len(x)
        return Seen(errors, scores, novel, weights, drifts)

    def errors(self, x: Tensor, labels: Tensor) -> Tensor:
        """1 where the readout is wrong about a batch, and 0 where it is right, [B]; nothing is learnt."""
        answers = self.readout.scores(self.stack.encode(x).features)
        assert answers is not None
        return (answers.argmax(dim=1) != labels).double()

    def state(self) -> State:
        """Of all parts."""
        return joined({name: getattr(self, name).state() for name in ("stack", "readout", "detector", "monitor")})

    def restore(self, state: State) -> None:
        """Set what `state` gave."""
        for name in ("stack", "readout", "detector", "monitor"):
            getattr(self, name).restore(part_of(state, name))
