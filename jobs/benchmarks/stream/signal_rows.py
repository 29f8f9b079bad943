"""Rows for streams of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from jobs.benchmarks.stream.electricity import WINDOW
from jobs.benchmarks.stream.rivals import AdaptiveForest, NetworkSettings, signal_network
from jobs.benchmarks.stream.rows import Fixed, Kind, NoChange, Row, SimilarityMatching, WithReadout
from jobs.benchmarks.stream.streams import Stream
from jobs.benchmarks.windows import rows_of
from simmatch.config import ModelConfig, parse
from simmatch.model import Stack
from simmatch.online.rate import RateConfig
from simmatch.online.readout import ReadoutConfig

RECOMPUTE_EVERY = 16
"""Batches."""


def _layer(**layer: object) -> ModelConfig:
    return parse(ModelConfig, {"layers": [layer | {"dynamics": {"exchange": "gather_state"}}]})


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


@dataclass(frozen=True)
class Recipe:
    """What the rows of a kind of stream are made of.

    Attributes
    ----------
    layers: name → our layer, which is the geometry of random filters as well; each row chooses on the warm-up.
    learning: name → how our layer learns.
    readout: of every row. The reservoir is used where features move.
    steps: numbers of steps that a network may take with a batch.
    of_forest: what the forest sees of a record.
    """

    layers: Mapping[str, ModelConfig]
    learning: Mapping[str, Learning]
    readout: ReadoutConfig
    steps: Sequence[int]
    of_forest: Callable[[Tensor], Tensor]

    def ours(self) -> dict[str, tuple[ModelConfig, Learning]]:
        """All pairs of a layer and how it learns."""
        return {
            ", ".join(filter(None, (of_layer, of_learning))): (layer, learning)
            for of_layer, layer in self.layers.items()
            for of_learning, learning in self.learning.items()
        }


def _similarity_matching(
    frozen: bool, readout: ReadoutConfig, stream: Stream, seed: int, settings: tuple[ModelConfig, Learning]
) -> Row:
    model, learning = settings
    return WithReadout(
        SimilarityMatching(stream, model, seed, RateConfig(kind="falling", decay_steps=learning.decay_steps)),
        readout,
        frozen_after=0 if frozen else None,
        recompute_every=RECOMPUTE_EVERY if learning.recompute else 0,
    )


def _fixed(name: str, readout: ReadoutConfig, stream: Stream, seed: int, model: ModelConfig) -> Row:
    stack = Stack(model, stream.source, seed=seed)
    stack.layer(0).calibrate(stream.warm_up.read(slice(None)))
    functions, layer = rows_of(stack, seed), stack.layer(0)
    whitening = layer.whitening.nbytes if name.endswith("whitened") else 0
    return WithReadout(Fixed(functions[name], layer.feedforward.nbytes + whitening), readout)


def _of_spectrum(readout: ReadoutConfig, stream: Stream, seed: int, function: Callable[[Tensor], Tensor]) -> Row:
    return WithReadout(Fixed(lambda x: function(_spectrum(x))), readout)


SPECTRA: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"magnitudes": lambda values: values, "roots": Tensor.sqrt, "logarithms": Tensor.log1p}
)


def _spectrum(x: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(x).abs()
    return spectrum.flatten(1)


def _forest(function: Callable[[Tensor], Tensor], stream: Stream, seed: int, settings: tuple[int, bool]) -> Row:
    return AdaptiveForest(function, *settings, seed)


FORESTS: Mapping[str, tuple[int, bool]] = MappingProxyType(
    {
        f"{models} trees{'' if drifts else ', never replaced'}": (models, drifts)
        for models in (10, 30)
        for drifts in (True, False)
    }
)
"""Trees, and whether one is replaced when its errors grow, as they do with every batch of another class."""


def _network(readout: ReadoutConfig | None, stream: Stream, seed: int, settings: NetworkSettings) -> Row:
    network = signal_network(stream, settings, seed)
    return network if readout is None else WithReadout(network, readout, recompute_every=RECOMPUTE_EVERY)


def _networks(replay: int, steps: Sequence[int]) -> dict[str, NetworkSettings]:
    return {
        f"lr {lr:g}, {count} {'steps' if count > 1 else 'step'}": NetworkSettings(lr=lr, steps=count, replay=replay)
        for lr in (1e-3, 4e-3)
        for count in steps
    }


def _rows(recipe: Recipe) -> Mapping[str, Kind]:
    """Ours first."""
    readout, steps = recipe.readout, recipe.steps
    rows = {
        "similarity matching": Kind(partial(_similarity_matching, False, readout), recipe.ours()),
        "similarity matching, frozen": Kind(partial(_similarity_matching, True, readout), recipe.ours()),
        "random": Kind(partial(_fixed, "random", readout), recipe.layers),
        "random, whitened": Kind(partial(_fixed, "random, whitened", readout), recipe.layers),
        "spectrum": Kind(partial(_of_spectrum, readout), SPECTRA),
        "network": Kind(partial(_network, None), _networks(0, steps)),
        "network, replay of 200": Kind(partial(_network, None), _networks(200, steps)),
        "network + readout": Kind(partial(_network, readout), _networks(0, steps)),
        "network, replay of 200 + readout": Kind(partial(_network, readout), _networks(200, steps)),
        "adaptive random forest": Kind(partial(_forest, recipe.of_forest), FORESTS),
        "no-change": Kind(lambda stream, seed, _: NoChange()),
    }
    return MappingProxyType(rows)


BEARINGS_LAYER = _layer(
    out_channels=128,
    kernel_size=[1, 32],
    whiten=True,
    whiten_ridge=0.001,
    pool=[1, 1],
    power=0.3,
    plasticity={"lr": 0.3},
    train={"positions": 16},
)
"""Pools over all positions; chosen by hand on the warm-up."""

BEARINGS = _rows(
    Recipe(
        layers={"": BEARINGS_LAYER},
        learning={
            f"rate halved after {steps} updates, readout {'recomputed' if recompute else 'summed'}": Learning(
                steps, recompute
            )
            for steps in (5, 20, 100)
            for recompute in (False, True)
        },
        readout=ReadoutConfig(reservoir=500),
        steps=(1, 10),
        of_forest=_spectrum,
    )
)

ELECTRICITY = _rows(
    Recipe(
        layers={
            f"power {power:g}, whiten_ridge {ridge:g}": _layer(
                out_channels=64, kernel_size=1, whiten=True, whiten_ridge=ridge, pool=[1, WINDOW], power=power,
                plasticity={"lr": 0.05},
            )
            for power in (0.3, 1.0)
            for ridge in (0.001, 0.01)
        },
        learning={f"rate halved after {steps} updates": Learning(steps, recompute=False) for steps in (5, 100)},
        readout=ReadoutConfig(forgetting=0.999),
        steps=(1,),
        of_forest=lambda x: x[..., -1].flatten(1),
    )
)  # fmt: skip
"""A filter sees one half-hour, and no position is pooled away: chosen by hand on the warm-up, as was the forgetting.
Records come one by one, so that nothing is recomputed. The forest sees the last half-hour, as in the literature."""
