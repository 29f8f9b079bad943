"""Does a LeNet need fewer labels if its convolutions start from similarity matching? Paired comparisons.

One network is trained from four starts, which differ in its convolutions alone:

    random          drawn (He et al. 2015), all weights trained
    random_frozen   drawn and not changed, dense layers trained
    nsm_frozen      learnt without labels by similarity matching (`finetuning_start`), not changed afterwards
    nsm             the same, fine-tuned with the rest

With one seed all starts share the labelled images, the initial dense weights, and the order of the batches. Settings
are chosen on held-out images for every network, budget and start, from the same candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import Name
from cluster.tracking.config import TrackingConfig
from jobs.evaluation.backprop import CANDIDATES, candidates, compare, predict, train
from jobs.evaluation.finetuning_start import PretrainedFilters, StartConfig, pretrain
from jobs.evaluation.lenet import LEAST_SIDE, LeNet, LeNetSizes, initialise
from jobs.evaluation.material import Material
from jobs.evaluation.memory import VALUE_BYTES
from simmatch.config import ConfigError, Frozen, PositiveInt
from simmatch.data.config import DataConfig
from simmatch.readout import accuracy

StartName = Literal["random", "random_frozen", "nsm_frozen", "nsm"]
STARTS: tuple[StartName, ...] = get_args(StartName)
BASELINE: StartName = "random"
"""The start that the others are compared with."""

FREE = frozenset({"tracking", "quick"})
"""Keys that results do not depend on."""


class BudgetConfig(Frozen):
    """One budget of labels."""

    labels: PositiveInt
    """Per class."""

    seeds: PositiveInt
    """Seeds 0 to seeds − 1: of label subsets, dense weights, order, random convolutions and similarity matching."""


class FinetuneConfig(Frozen):
    """Everything about one comparison of starts."""

    name: Name
    """Names the run and its default folder, runs/<name>."""

    data: DataConfig

    networks: Annotated[
        dict[Name, Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]], Field(min_length=1)
    ]
    """Name → maps of the two convolutions."""

    budgets: Annotated[tuple[BudgetConfig, ...], Field(strict=False, min_length=1)]
    """The smallest first."""

    held_out: PositiveInt = 5000
    """The last so many training images are not trained on: settings are chosen on them."""

    tuning_seeds: PositiveInt = 2
    """The first so many seeds of a budget decide on its settings, by their mean accuracy on held-out images."""

    layers: Annotated[tuple[StartConfig, StartConfig], Field(strict=False)]
    """How similarity matching learns the weights of each convolution."""

    tracking: TrackingConfig = TrackingConfig()

    quick: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Overrides that `--quick` applies: the same table in minutes, with less precise figures."""

    @model_validator(mode="after")
    def _budgets_rise(self) -> FinetuneConfig:
        labels = [each.labels for each in self.budgets]
        if labels != sorted(set(labels)):
            raise ValueError(f"expected rising budgets, got {labels}")
        return self

    def comparable(self) -> dict[str, Any]:
        """What results depend on, as plain values."""
        values = self.model_dump(mode="json", exclude=set(FREE))
        values["candidates"] = {kind: [asdict(each) for each in some] for kind, some in CANDIDATES.items()}
        return values


def check(config: FinetuneConfig, material: Material) -> None:
    """Check what can be checked before anything learns.

    Raises
    ------
    ConfigError
        A budget that a class cannot fill, or images too small for a LeNet.
    """
    material.check_budgets({f"budgets.{index}.labels": budget.labels for index, budget in enumerate(config.budgets)})
    if min(material.source.image_size) < LEAST_SIDE:
        height, width = material.source.image_size
        raise ConfigError(f"data: expected images of at least {LEAST_SIDE} × {LEAST_SIDE}, got {height} × {width}")


def held_bytes(config: FinetuneConfig, material: Material) -> dict[str, int]:
    """Memory of each kind of work at its most, besides images that are in memory before, per thread.

    The images that filters are learnt from, with what the first convolution passes on; the inputs of the dense layers
    of frozen convolutions.
    """
    source, sizes, count = material.source, LeNetSizes.of(material.source.image_size), len(material.train)
    first, last = (max(each[index] for each in config.networks.values()) for index in (0, 1))
    images = max(min(each.train.images or count, count) for each in config.layers)
    passed = first * math.prod(side // 2 for side in sizes.first)
    labelled = min(count, max(budget.labels for budget in config.budgets) * source.num_classes)
    return {
        "similarity matching": VALUE_BYTES * images * (source.in_channels * math.prod(source.image_size) + passed),
        "frozen convolutions": VALUE_BYTES * labelled * sizes.features((first, last)),
    }


class StartResult(BaseModel):
    """One network, budget, seed and start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str
    labels: int
    """Per class."""

    seed: int
    start: StartName
    settings: int
    """Index of the candidate that was chosen."""

    accuracy: float
    """On the test images, read once."""


def chosen_candidate(held_out: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The candidate with the highest mean accuracy on held-out images, of equals the first, and all means.

    held_out: accuracies by seed and candidate.

    >>> chosen_candidate([[0.5, 0.75], [0.75, 1.0]])
    {'chosen': 1, 'held_out': [0.625, 0.875], 'seeds': 2}
    """
    means = [fmean(values) for values in zip(*held_out, strict=True)]
    return {"chosen": means.index(max(means)), "held_out": means, "seeds": len(held_out)}


@dataclass(frozen=True, eq=False)
class Trial:
    """One network with one seed, ready to be trained from any start at any budget.

    Attributes
    ----------
    channels: maps of its convolutions.
    pretrained: filters that similarity matching has learnt with this seed.
    """

    network: str
    channels: tuple[int, int]
    seed: int
    pretrained: PretrainedFilters
    material: Material

    @classmethod
    def of(cls, config: FinetuneConfig, network: str, seed: int, material: Material, path: Path) -> Trial:
        """With filters from similarity matching: those kept at `path`, or learnt now and kept there."""
        channels = config.networks[network]
        pretrained = PretrainedFilters.load(path)
        if pretrained is None:
            net = random_net(channels, seed, material)
            pretrained = pretrain(net, material.train.images, config.layers, seed)
            pretrained.save(path)
        return cls(network, channels, seed, pretrained, material)

    def net(self, start: StartName) -> LeNet:
        """The network before training; the same at every call."""
        net = random_net(self.channels, self.seed, self.material)
        if is_pretrained(start):
            initialise(net, self.pretrained.filters)
        return net

    def tune(self, labels: int, start: StartName) -> list[float]:
        """Accuracy of each candidate on held-out images."""
        return compare(
            lambda: self.net(start),
            self.material.to_learn(labels, self.seed),
            self.material.held_out,
            candidates(labels),
            self.seed,
            frozen=is_frozen(start),
        )

    def trained(self, labels: int, start: StartName, settings: int) -> LeNet:
        """The network after training under one of the candidates."""
        net = self.net(start)
        learn = self.material.to_learn(labels, self.seed)
        train(net, learn.images, learn.labels, candidates(labels)[settings], self.seed, is_frozen(start))
        return net

    def result(self, labels: int, start: StartName, settings: int) -> StartResult:
        """Train, and read the test images once."""
        net, test = self.trained(labels, start, settings), self.material.test
        return StartResult(
            network=self.network,
            labels=labels,
            seed=self.seed,
            start=start,
            settings=settings,
            accuracy=accuracy(predict(net, test.images), test.labels),
        )


def random_net(channels: tuple[int, int], seed: int, material: Material) -> LeNet:
    source = material.source
    return LeNet(source.in_channels, source.image_size, source.num_classes, channels=channels, seed=seed)


def is_pretrained(start: StartName) -> bool:
    return start in ("nsm", "nsm_frozen")


def is_frozen(start: StartName) -> bool:
    return start in ("random_frozen", "nsm_frozen")
