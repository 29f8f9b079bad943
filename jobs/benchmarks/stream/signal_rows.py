"""Rows for streams of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from jobs.benchmarks.stream.rivals import AdaptiveForest, NetworkSettings, signal_network
from jobs.benchmarks.stream.rows import Fixed, Kind, NoChange, Row, SimilarityMatching, WithReadout
from jobs.benchmarks.stream.streams import Stream
from jobs.benchmarks.windows import rows_of
from simmatch.config import ModelConfig, parse
from simmatch.model import Stack
from simmatch.online.rate import RateConfig
from simmatch.online.readout import ReadoutConfig

READOUT = ReadoutConfig(reservoir=500)
"""Of every row. The reservoir is used where features move."""

RECOMPUTE_EVERY = 16
"""Batches."""

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        name: parse(ModelConfig, {"layers": [layer | {"dynamics": {"exchange": "gather_state"}}]})
        for name, layer in {
            "bearings": {
                "out_channels": 128, "kernel_size": [1, 32], "whiten": True, "whiten_ridge": 0.001, "pool": [1, 1],
                "power": 0.3, "plasticity": {"lr": 0.3}, "train": {"positions": 16},
            },
            "electricity": {
                "out_channels": 64, "kernel_size": [1, 8], "whiten": True, "whiten_ridge": 0.001, "power": 0.3,
                "plasticity": {"lr": 0.05},
            },
        }.items()
    }
)  # fmt: skip
"""Our rows, and the geometry of random filters, by the kind of stream; chosen on the warm-up."""


@dataclass(frozen=True)
class Learning:
    """Settings of a row of similarity matching.

    Attributes
    ----------
    decay_steps: updates after which the rate of the layer has fallen to a half.
    recompute: whether the readout is computed anew from its reservoir while features move.
    """

    decay_steps: int
    recompute: bool


LEARNING: Mapping[str, Learning] = MappingProxyType(
    {
        f"rate halved after {steps} updates, readout {'recomputed' if recompute else 'summed'}": Learning(
            steps, recompute
        )
        for steps in (5, 20, 100)
        for recompute in (False, True)
    }
)


def _model(stream: Stream) -> ModelConfig:
    return MODELS["electricity" if stream.name.startswith("electricity") else "bearings"]


def _similarity_matching(frozen: bool, stream: Stream, seed: int, settings: Learning) -> Row:
    rate = RateConfig(kind="falling", decay_steps=settings.decay_steps)
    return WithReadout(
        SimilarityMatching(stream, _model(stream), seed, rate),
        READOUT,
        frozen_after=0 if frozen else None,
        recompute_every=RECOMPUTE_EVERY if settings.recompute else 0,
    )


def _fixed(name: str, stream: Stream, seed: int, _: None) -> Row:
    stack = Stack(_model(stream), stream.source, seed=seed)
    stack.layer(0).calibrate(stream.warm_up.read(slice(None)))
    functions, layer = rows_of(stack, seed), stack.layer(0)
    whitening = layer.whitening.nbytes if name.endswith("whitened") else 0
    return WithReadout(Fixed(functions[name], layer.feedforward.nbytes + whitening), READOUT)


def _of_spectrum(stream: Stream, seed: int, function: Callable[[Tensor], Tensor]) -> Row:
    return WithReadout(Fixed(lambda x: function(_spectrum(x))), READOUT)


SPECTRA: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"magnitudes": lambda values: values, "roots": Tensor.sqrt, "logarithms": Tensor.log1p}
)


def _spectrum(x: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(x).abs()
    return spectrum.flatten(1)


def _forest(function: Callable[[Tensor], Tensor], stream: Stream, seed: int, models: int) -> Row:
    return AdaptiveForest(function, models, seed)


def _network(readout: bool, stream: Stream, seed: int, settings: NetworkSettings) -> Row:
    network = signal_network(stream, settings, seed)
    return WithReadout(network, READOUT, recompute_every=RECOMPUTE_EVERY) if readout else network


def _networks(replay: int, steps: Sequence[int]) -> dict[str, NetworkSettings]:
    return {
        f"lr {lr:g}, {count} {'steps' if count > 1 else 'step'}": NetworkSettings(lr=lr, steps=count, replay=replay)
        for lr in (1e-3, 4e-3)
        for count in steps
    }


def _rows(
    learning: Mapping[str, Learning], steps: Sequence[int], of_forest: Callable[[Tensor], Tensor]
) -> dict[str, Kind]:
    """Ours first."""
    return {
        "similarity matching": Kind(partial(_similarity_matching, False), learning),
        "similarity matching, frozen": Kind(partial(_similarity_matching, True), learning),
        "random": Kind(partial(_fixed, "random")),
        "random, whitened": Kind(partial(_fixed, "random, whitened")),
        "spectrum": Kind(_of_spectrum, SPECTRA),
        "network": Kind(partial(_network, False), _networks(0, steps)),
        "network, replay of 200": Kind(partial(_network, False), _networks(200, steps)),
        "network + readout": Kind(partial(_network, True), _networks(0, steps)),
        "network, replay of 200 + readout": Kind(partial(_network, True), _networks(200, steps)),
        "adaptive random forest": Kind(partial(_forest, of_forest), {"10 trees": 10}),
        "no-change": Kind(lambda stream, seed, _: NoChange()),
    }


BEARINGS: Mapping[str, Kind] = MappingProxyType(_rows(LEARNING, (1, 10), _spectrum))

ELECTRICITY: Mapping[str, Kind] = MappingProxyType(
    _rows({name: each for name, each in LEARNING.items() if not each.recompute}, (1,), lambda x: x[..., -1].flatten(1))
)
"""Records come one by one, so that nothing is recomputed. The forest sees the last half-hour, as in the literature."""
