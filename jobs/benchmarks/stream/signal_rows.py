"""Rows for streams of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from jobs.benchmarks.stream.rivals import AdaptiveForest, NetworkSettings, signal_network
from jobs.benchmarks.stream.rows import Fixed, Kind, NoChange, Row, WithReadout
from jobs.benchmarks.stream.streams import Stream
from jobs.benchmarks.windows import rows_of
from simmatch.config import ModelConfig, parse
from simmatch.model import Stack
from simmatch.online.readout import ReadoutConfig

READOUT = ReadoutConfig()
"""Of every row."""

MODELS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "bearings": {
            "layers": [
                {
                    "out_channels": 128, "kernel_size": [1, 64], "stride": [1, 4], "whiten": True,
                    "whiten_ridge": 0.001, "pool": [1, 1], "power": 0.5,
                    "plasticity": {"lr": 0.1, "lr_decay_steps": 100},
                    "dynamics": {"exchange": "gather_state", "encode_iterations": 20},
                    "train": {"positions": 16},
                }
            ]
        },
        "electricity": {
            "layers": [
                {
                    "out_channels": 64, "kernel_size": [1, 8], "whiten": True, "whiten_ridge": 0.001, "power": 0.5,
                    "dynamics": {"exchange": "gather_state", "encode_iterations": 20},
                }
            ]
        },
    }
)  # fmt: skip
"""Layers of our row and of the random ones, by the kind of stream; chosen on the warm-up."""


class SimilarityMatching:
    """A stack that learns from every batch."""

    def __init__(self, stream: Stream, model: ModelConfig, seed: int) -> None:
        self.stack = calibrated(stream, model, seed)

    def encode(self, x: Tensor) -> Tensor:
        """See `Features`."""
        return self.stack.features(x)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """See `Features`."""
        layer = self.stack.layer(0)
        layer.partial_fit(layer.prepare(x, self.stack.config.layers[0].train.positions))

    def learn_labels(self, x: Tensor, labels: Tensor) -> None:
        """Nothing."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(value.nbytes for value in self.stack.state_dict().values())


def calibrated(stream: Stream, model: ModelConfig, seed: int) -> Stack:
    """An untrained stack whose first layer has seen the warm-up, for its whitening."""
    stack = Stack(model, stream.source, seed=seed)
    stack.layer(0).calibrate(stream.warm_up.read(slice(None)), model.layers[0].whiten_patches)
    return stack


def _model(stream: Stream) -> ModelConfig:
    name = "electricity" if stream.name.startswith("electricity") else "bearings"
    return parse(ModelConfig, dict(MODELS[name]))


def _similarity_matching(frozen: bool, stream: Stream, seed: int, _: None) -> Row:
    return WithReadout(SimilarityMatching(stream, _model(stream), seed), READOUT, frozen_after=0 if frozen else None)


def _fixed(name: str, stream: Stream, seed: int, _: None) -> Row:
    return WithReadout(Fixed(rows_of(calibrated(stream, _model(stream), seed), seed)[name]), READOUT)


def _spectrum(x: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(x).abs()
    return spectrum.flatten(1)


def _forest(function: Callable[[Tensor], Tensor], stream: Stream, seed: int, models: int) -> Row:
    return AdaptiveForest(function, models, seed)


def _network(readout: bool, stream: Stream, seed: int, settings: NetworkSettings) -> Row:
    network = signal_network(stream, settings, seed)
    return WithReadout(network, READOUT) if readout else network


def _networks(replay: int) -> dict[str, NetworkSettings]:
    return {
        f"lr {lr:g}, {steps} steps": NetworkSettings(lr=lr, steps=steps, replay=replay)
        for lr in (1e-3, 4e-3)
        for steps in (1, 5, 20)
    }


ROWS: Mapping[str, Kind] = MappingProxyType(
    {
        "similarity matching": Kind(partial(_similarity_matching, False)),
        "similarity matching, frozen": Kind(partial(_similarity_matching, True)),
        "random": Kind(partial(_fixed, "random")),
        "random, whitened": Kind(partial(_fixed, "random, whitened")),
        "spectrum": Kind(partial(_fixed, "spectrum")),
        "network": Kind(partial(_network, False), _networks(0)),
        "network, replay of 200": Kind(partial(_network, False), _networks(200)),
        "network + readout": Kind(partial(_network, True), _networks(0)),
        "network, replay of 200 + readout": Kind(partial(_network, True), _networks(200)),
        "adaptive random forest": Kind(partial(_forest, _spectrum), {"10 trees": 10}),
        "no-change": Kind(lambda stream, seed, _: NoChange()),
    }
)
"""Ours first."""

ELECTRICITY: Mapping[str, Kind] = MappingProxyType(
    {**ROWS, "adaptive random forest": Kind(partial(_forest, lambda x: x[..., -1].flatten(1)), {"10 trees": 10})}
)
"""The forest sees the last half-hour, as in the literature."""

REFERENCES: Sequence[str] = ("similarity matching, frozen", "random", "random, whitened")
