"""Rows for streams of images; settings are chosen on `Stream.pilot`.

Equal bytes: a rival gets as much of what it keeps (random features of RanDumb, records for replay) as fits into the
whole state of our row, `own_bytes`. The random projection of RanDumb, which follows from a seed, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor

from jobs.benchmarks.stream.discriminant import NearestMean, StreamingDiscriminant, fourier_features
from jobs.benchmarks.stream.image_rivals import Joint, LeNetRow
from jobs.benchmarks.stream.rivals import NetworkSettings
from jobs.benchmarks.stream.rows import Fixed, Kind, Row, SimilarityMatching, WithReadout
from jobs.benchmarks.stream.streams import Stream
from jobs.evaluation import backprop
from jobs.evaluation.lenet import LeNet
from simmatch.config import ModelConfig, parse
from simmatch.model import build_layer, pooled
from simmatch.online.rate import RateConfig
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.seeding import seeded

LAYER: Mapping[str, object] = MappingProxyType(
    {
        "out_channels": 64, "kernel_size": 7, "padding": 3, "normalize": "contrast", "whiten": True,
        "whiten_ridge": 0.1, "pool": 4, "power": 0.5,
        "dynamics": {"exchange": "gather_state"},
    }
)  # fmt: skip
"""Of our rows, and the geometry of random filters: the setting of the comparison, with half of its channels."""

MODEL = parse(ModelConfig, {"layers": [dict(LAYER)]})

RATES: Mapping[str, RateConfig] = MappingProxyType(
    {
        "falling rate": RateConfig(kind="falling", decay_steps=20),
        "constant rate": RateConfig(),
        "lower constant rate": RateConfig(kind="falling", decay_steps=1, lowest=0.2),
    }
)
"""Of layers that learn throughout: η = 0.1 falling, 0.1, and 0.02."""

UNTIL_FROZEN = RateConfig(kind="falling", decay_steps=100)
"""Of layers that are frozen after the warm-up."""

SUMMED = ReadoutConfig(kind="ridge")
"""The readout of Split-Fashion-MNIST: nothing may be forgotten."""

TURNING = ReadoutConfig(kind="ridge", forgetting=0.999)
"""The readout of images that turn: half of the weight is on the last 700 records. Best of γ = 1, 0.9998, 0.9996 and
0.999 on the pilot, for frozen features and random filters alike."""

CORRUPTED = ReadoutConfig(kind="ridge", forgetting=0.9996)
"""The readout of corruptions that change: half of the weight is on the last 1,700 records. Chosen likewise."""

RECOMPUTED = ReadoutConfig(kind="ridge", reservoir=500)
"""The readout whose sums are computed anew every `RECOMPUTE_EVERY` batches, from records as features are by then."""

RECOMPUTE_EVERY = 20


def random_features(stream: Stream, seed: int, threshold: float) -> Fixed:
    """Rectified Gaussian filters of the same patches, contrast-normalised and whitened alike.

    Parameters
    ----------
    threshold: in deviations of the filter's response on the warm-up.
    """
    layer, config = build_layer(MODEL, stream.source, 0, seed=seed), MODEL.layers[0]
    layer.calibrate(stream.warm_up.read(slice(None)))
    layer.feedforward.copy_(torch.randn(layer.feedforward.shape, generator=seeded("random filters", seed)))
    deviation = layer.drive(stream.warm_up.read(slice(None))).std(dim=1)

    def encode(x: Tensor) -> Tensor:
        maps = (layer.drive(x) / deviation[:, None] - threshold).clamp(min=0.0)
        return pooled(rearrange(maps, "k (b h w) -> b k h w", b=len(x), h=x.shape[2]), config).flatten(1)

    whitening = layer.whitening.nbytes + layer.whitening_mean.nbytes
    return Fixed(encode, layer.feedforward.nbytes + deviation.nbytes + whitening)


# -- how rows are made ------------------------------------------------------------------------------------------------


def own_bytes(stream: Stream) -> int:
    """Most bytes of state of our row, the readout included."""
    features = SimilarityMatching(stream, MODEL, 0, UNTIL_FROZEN)
    size = features.encode(stream.warm_up.read(slice(1))).shape[1]
    return features.nbytes + 8 * (2 * size**2 + (512 + stream.classes) * size)


def discriminant_size(budget: int, classes: int) -> int:
    """Features whose scatter, class means and counts take at most so many bytes.

    >>> discriminant_size(8 * (100 * 100 + 10 * 100 + 10), classes=10)
    100
    """
    values = budget // 8 - classes
    return (math.isqrt(classes**2 + 4 * values) - classes) // 2


_after_warm_up = partial(WithReadout, afresh_after=-1)
"""All readouts begin where that of frozen features begins."""


def _online(config: ReadoutConfig, stream: Stream, seed: int, rate: RateConfig) -> Row:
    return _after_warm_up(SimilarityMatching(stream, MODEL, seed, rate), config)


def _recomputed(stream: Stream, seed: int, rate: RateConfig) -> Row:
    return _after_warm_up(SimilarityMatching(stream, MODEL, seed, rate), RECOMPUTED, recompute_every=RECOMPUTE_EVERY)


def _frozen(config: ReadoutConfig, stream: Stream, seed: int, _: None) -> Row:
    return _after_warm_up(SimilarityMatching(stream, MODEL, seed, UNTIL_FROZEN), config, frozen_after=-1)


def _random(config: ReadoutConfig, stream: Stream, seed: int, threshold: float) -> Row:
    return _after_warm_up(random_features(stream, seed, threshold), config)


def _joint(stream: Stream, seed: int, _: None) -> Row:
    def fit(x: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        readout, order = OnlineReadout(x.shape[1], SUMMED), torch.randperm(len(x), generator=seeded("joint", seed))
        readout.learn(x[order], labels[order])
        assert readout.classifier is not None
        return readout.classifier.predict

    return Joint(SimilarityMatching(stream, MODEL, seed, UNTIL_FROZEN), fit, len(stream.segments))


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _pixel_count(stream: Stream) -> int:
    return math.prod(stream.warm_up.x.shape[1:])


def _nearest_mean(stream: Stream, seed: int, _: None) -> Row:
    return NearestMean(_flat, _pixel_count(stream), stream.classes)


def _discriminant(stream: Stream, seed: int, shrinkage: float | None) -> Row:
    return StreamingDiscriminant(_flat, _pixel_count(stream), stream.classes, shrinkage)


def _randumb(stream: Stream, seed: int, settings: tuple[float, float | None]) -> Row:
    width, shrinkage = settings
    size, pixels = discriminant_size(own_bytes(stream), stream.classes), _pixel_count(stream)
    scale = pixels * float(stream.warm_up.read(slice(None)).var())
    return StreamingDiscriminant(fourier_features(size, pixels, width / scale, seed), size, stream.classes, shrinkage)


def _lenet(replay: int | None, stream: Stream, seed: int, settings: NetworkSettings) -> Row:
    row = LeNetRow(stream, replace(settings, replay=replay or 0), seed)
    if replay is None:  # as many records as fit into the state of our row
        record = _pixel_count(stream) + stream.warm_up.labels.element_size()
        row.settings = replace(settings, replay=(own_bytes(stream) - row.nbytes) // record)
    return row


def _lenet_joint(stream: Stream, seed: int, settings: backprop.TrainSettings) -> Row:
    def fit(x: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        net = LeNet(stream.source.in_channels, stream.source.image_size, stream.classes, seed=seed)
        with torch.enable_grad():
            backprop.train(net, x, labels, settings, seed)
        return lambda images: backprop.predict(net, images).argmax(dim=1)

    return Joint(Fixed(lambda x: x), fit, len(stream.segments))


THRESHOLDS: Mapping[str, float] = MappingProxyType({f"threshold {value:g}": value for value in (0.0, 0.25)})
SHRINKAGES: Mapping[str, float | None] = MappingProxyType({"oracle": None, "0.03": 0.03})
WIDTHS: Mapping[str, tuple[float, float | None]] = MappingProxyType(
    {
        "γ × 0.5": (0.5, None),
        "γ × 1": (1.0, None),
        "γ × 2": (2.0, None),
        "γ × 1, shrinkage 0.03": (1.0, 0.03),
    }
)
"""γ in units of 1 / (pixels × variance of a pixel), the value of RanDumb's code, which takes the oracle's shrinkage."""
TUNING: Mapping[str, NetworkSettings] = MappingProxyType(
    {
        f"lr {lr:g}, {steps} {'steps' if steps > 1 else 'step'}": NetworkSettings(lr=lr, steps=steps)
        for lr in (5e-4, 2e-3)
        for steps in (1, 4)
    }
)
LENETS: Mapping[str, Kind] = MappingProxyType(
    {
        "LeNet": Kind(partial(_lenet, 0), TUNING),
        "LeNet, replay of 200": Kind(partial(_lenet, 200), TUNING),
        "LeNet, replay of 500": Kind(partial(_lenet, 500), TUNING),
        "LeNet, replay at equal bytes": Kind(partial(_lenet, None), TUNING),
    }
)


def _own(config: ReadoutConfig) -> dict[str, Kind]:
    return {
        "similarity matching, online": Kind(partial(_online, config), RATES),
        "similarity matching, frozen": Kind(partial(_frozen, config)),
        "random filters": Kind(partial(_random, config), THRESHOLDS),
    }


SPLIT_ROWS: Mapping[str, Kind] = MappingProxyType(
    {
        **_own(SUMMED),
        "similarity matching, online, recomputed from 500": Kind(_recomputed, RATES),
        "nearest mean": Kind(_nearest_mean),
        "streaming LDA": Kind(_discriminant, SHRINKAGES),
        "RanDumb, equal bytes": Kind(_randumb, WIDTHS),
        **LENETS,
        "joint, frozen features": Kind(_joint),
        "joint, LeNet": Kind(_lenet_joint, {"": backprop.CANDIDATES["many"][0]}),
    }
)

_SOME_LENETS = {name: LENETS[name] for name in ("LeNet", "LeNet, replay of 500")}

ROTATING_ROWS: Mapping[str, Kind] = MappingProxyType(_own(TURNING) | _SOME_LENETS)

CORRUPTED_ROWS: Mapping[str, Kind] = MappingProxyType(_own(CORRUPTED) | _SOME_LENETS)
