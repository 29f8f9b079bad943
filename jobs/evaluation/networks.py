"""Networks trained by backpropagation, as rows of an evaluation: settings are chosen anew at every label budget.

To add a network write its class beside `jobs.evaluation.lenet` and an entry of `NETWORKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch

from jobs.evaluation.backprop import TrainSettings, candidates, encode, predict, train, tune
from jobs.evaluation.features import Plan
from jobs.evaluation.lenet import DENSE, LeNet
from jobs.evaluation.material import Labelled, Material, corrupted, resized, with_outliers
from jobs.evaluation.readouts import accuracy_of, choose_ridge, neighbours_accuracy
from jobs.evaluation.results import Result, budget_name
from jobs.evaluation.stacks import Seen, unseen
from jobs.evaluation.together import together
from simmatch.model import InputConfig

T = TypeVar("T")

TUNING_SHARE = 0.25
"""Share of the steps after which settings for all labels are compared; those for fewer labels take all steps."""


@dataclass(frozen=True)
class Network:
    """A LeNet of some width.

    Attributes
    ----------
    channels: maps of the two convolutions.
    contrast: the first convolution sees contrast-normalised patches.
    """

    name: str
    channels: tuple[int, int]
    contrast: bool = False

    def make(self, source: InputConfig, seed: int) -> LeNet:
        """With random weights."""
        return LeNet(
            source.in_channels,
            source.image_size,
            source.num_classes,
            channels=self.channels,
            contrast=self.contrast,
            seed=seed,
        )

    def tune(self, material: Material, plan: Plan, seed: int, seen: Seen = unseen) -> dict[str, int]:
        """Budget → index of the settings that do best on held-out images."""

        def best(budget: int | None) -> int:
            settings = candidates(budget)[: plan.candidates]
            if len(settings) == 1:
                return 0
            found = tune(
                lambda: self.make(material.source, seed),
                material.train.take(material.labelled(budget, seed)),
                material.held_out,
                settings,
                seed,
                share=TUNING_SHARE if budget is None else 1.0,
            )
            return settings.index(found)

        return self._by_budget(best, plan, "try settings", seen)

    def evaluate(
        self,
        chosen: Mapping[str, int],
        material: Material,
        plan: Plan,
        seed: int,
        seen: Seen = unseen,
        *,
        every_readout: bool = True,
    ) -> tuple[Result, LeNet]:
        """One network per budget; the result, and the network that learnt from all labels.

        Its seconds are those of one thread, while others learn from fewer labels beside it.

        every_readout: nearest neighbours of what its convolutions give, too.
        """

        def learnt(budget: int | None) -> tuple[LeNet, float]:
            started = time.monotonic()
            images = material.train.take(material.labelled(budget, seed))
            net = self._learn(images, self.settings(chosen, budget), material, seed)
            return net, time.monotonic() - started

        found = self._by_budget(learnt, plan, "learn", seen)
        net, seconds = found["all"]
        started = time.monotonic()
        scores = predict(net, material.test.images)
        rate = len(material.test) / max(time.monotonic() - started, 1e-9)
        cost = net.cost()
        result = Result(
            row=self.name,
            seed=seed,
            settings=" ".join(f"{name}: {index}" for name, index in chosen.items()),
            features=DENSE[-1],
            parameters_trained=cost.trained,
            parameters_inference=cost.inference,
            operations=cost.operations,
            fit_seconds=seconds,
            images_per_second=rate,
        )
        for name, (each, _) in found.items():
            result.held_out[name] = accuracy_of(predict(each, material.held_out.images), material.held_out.labels)
            result.accuracy[name] = accuracy_of(predict(each, material.test.images), material.test.labels)
        result.accuracy["all"] = accuracy_of(scores, material.test.labels)
        if every_readout:
            result.neighbours = neighbours_accuracy(
                (encode(net, material.train.images), material.train.labels),
                (encode(net, material.test.images), material.test.labels),
                material.source.num_classes,
            )
        return result, net

    def _by_budget(self, work: Callable[[int | None], T], plan: Plan, words: str, seen: Seen) -> dict[str, T]:
        """Budget → what the work gives, several at a time, the longest first."""
        longest_first = plan.budgets[::-1]
        found: dict[int, T] = {}
        for place, value in together([partial(work, each) for each in longest_first], torch.get_num_threads()):
            found[place] = value
            seen(f"{words}, by labels per class", len(found), len(plan.budgets))
        return {budget_name(longest_first[place]): found[place] for place in sorted(found, reverse=True)}

    def settings(self, chosen: Mapping[str, int], budget: int | None) -> TrainSettings:
        """The settings that were chosen for a budget."""
        return candidates(budget)[chosen[budget_name(budget)]]

    def _learn(self, images: Labelled, settings: TrainSettings, material: Material, seed: int) -> LeNet:
        net = self.make(material.source, seed)
        train(net, images.images, images.labels, settings, seed)
        return net

    def with_noise(self, chosen: Mapping[str, int], material: Material, plan: Plan, seed: int) -> dict[str, float]:
        """As `jobs.evaluation.features.with_noise`: noise keeps the label of the image that it replaces."""
        part = material.train.take(slice(0, plan.outlier_images))
        test = material.test.take(slice(0, plan.corrupted_images or None))
        shares = (0.0, *plan.outlier_shares)

        def among(share: float) -> float:
            images = Labelled(with_outliers(part.images, share, seed), part.labels)
            net = self._learn(images, self.settings(chosen, None), material, seed)
            return accuracy_of(predict(net, test.images), test.labels)

        found = dict(together([partial(among, share) for share in shares], torch.get_num_threads()))
        return {f"{share:g}": found[place] for place, share in enumerate(shares)}


def under_corruption(net: LeNet, material: Material, count: int) -> dict[str, float]:
    """Accuracy under each corruption, and under none: `clean`."""
    images = {"clean": material.test.take(slice(0, count))} | corrupted(material.test, count, seed=0)
    return {name: accuracy_of(predict(net, each.images), each.labels) for name, each in images.items()}


def transferred(
    net: LeNet, other: Material, source: InputConfig, budgets: tuple[int | None, ...], seed: int
) -> dict[str, float]:
    """Test accuracy on a data set that the network has not seen, by readouts of its convolutions' output."""
    train_features, held_out, test = (
        encode(net, resized(part.images, source)) for part in (other.train, other.held_out, other.test)
    )
    least = int(torch.bincount(other.train.labels).min())
    found = {}
    for budget in (each for each in budgets if each is None or each <= least):
        index = other.labelled(budget, seed)
        readout, _ = choose_ridge(
            (train_features[index], other.train.labels[index]),
            (held_out, other.held_out.labels),
            other.source.num_classes,
        )
        found[budget_name(budget)] = accuracy_of(readout.scores(test), other.test.labels)
    return found


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        network.name: network
        for network in (
            Network("lenet", (6, 16)),
            Network("lenet_wide", (32, 64)),
            Network("lenet_contrast", (6, 16), contrast=True),
            Network("lenet_wide_contrast", (32, 64), contrast=True),
        )
    }
)
"""Rows of the comparison by name."""
