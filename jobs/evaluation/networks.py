"""Networks trained by backpropagation, as rows of a comparison; settings are chosen for every label budget.

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

from jobs.evaluation.backprop import TrainSettings, candidates, compare, encode, predict, train
from jobs.evaluation.config import MeasurementConfig
from jobs.evaluation.learners import OnProgress, no_progress
from jobs.evaluation.lenet import DENSE, LeNet
from jobs.evaluation.material import Labelled, Material, resized, with_outliers
from jobs.evaluation.readouts import neighbours_accuracy
from jobs.evaluation.results import RowResult, budget_name
from jobs.evaluation.robustness import transfer_accuracy, under_corruption
from jobs.evaluation.threads import run_in_threads
from simmatch.model import InputConfig
from simmatch.readout import accuracy

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

    def tune(
        self, material: Material, plan: MeasurementConfig, seed: int, on_progress: OnProgress = no_progress
    ) -> dict[str, int]:
        """Budget → index of the settings that do best on held-out images."""

        def choose(budget: int | None) -> int:
            settings = candidates(budget)[: plan.candidates]
            if len(settings) == 1:
                return 0
            accuracies = compare(
                lambda: self.make(material.source, seed),
                material.to_learn(budget, seed),
                material.held_out,
                [each.shortened(TUNING_SHARE if budget is None else 1.0) for each in settings],
                seed,
            )
            return accuracies.index(max(accuracies))

        return self._by_budget(choose, plan, "try settings", on_progress)

    def evaluate(
        self,
        chosen: Mapping[str, int],
        material: Material,
        plan: MeasurementConfig,
        seed: int,
        on_progress: OnProgress = no_progress,
        *,
        every_readout: bool = True,
    ) -> tuple[RowResult, LeNet]:
        """Train one network per budget; the result, and the network that learnt from all labels.

        Its seconds are those of one thread, while others learn from fewer labels at the same time.

        every_readout: also measure nearest neighbours of the convolutions' output, unless the plan is `ridge_only`.
        """

        def learnt(budget: int | None) -> tuple[LeNet, float]:
            started = time.monotonic()
            images = material.to_learn(budget, seed)
            net = self._learn(images, self.settings(chosen, budget), material, seed)
            return net, time.monotonic() - started

        trained = self._by_budget(learnt, plan, "learn", on_progress)
        net, seconds = trained["all"]
        started = time.monotonic()
        scores = predict(net, material.test.images)
        rate = len(material.test) / max(time.monotonic() - started, 1e-9)
        cost = net.cost()
        result = RowResult(
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
        for name, (each, _) in trained.items():
            result.held_out[name] = accuracy(predict(each, material.held_out.images), material.held_out.labels)
            result.accuracy[name] = accuracy(predict(each, material.test.images), material.test.labels)
        result.accuracy["all"] = accuracy(scores, material.test.labels)
        if every_readout and not plan.ridge_only:
            result.neighbours = neighbours_accuracy(
                (encode(net, material.train.images), material.train.labels),
                (encode(net, material.test.images), material.test.labels),
                material.source.num_classes,
            )
        return result, net

    def _by_budget(
        self, work: Callable[[int | None], T], plan: MeasurementConfig, words: str, on_progress: OnProgress
    ) -> dict[str, T]:
        """Budget → the result of the work, several at a time, the longest first."""
        longest_first = plan.all_budgets()[::-1]
        values: dict[int, T] = {}
        tasks = [partial(work, budget) for budget in longest_first]
        for index, value in run_in_threads(tasks, torch.get_num_threads()):
            values[index] = value
            on_progress(f"{words}, by labels per class", len(values), len(longest_first))
        return {budget_name(longest_first[index]): values[index] for index in sorted(values, reverse=True)}

    def settings(self, chosen: Mapping[str, int], budget: int | None) -> TrainSettings:
        """The settings chosen for a budget."""
        return candidates(budget)[chosen[budget_name(budget)]]

    def _learn(self, images: Labelled, settings: TrainSettings, material: Material, seed: int) -> LeNet:
        net = self.make(material.source, seed)
        train(net, images.images, images.labels, settings, seed)
        return net

    def with_noise(
        self, chosen: Mapping[str, int], material: Material, plan: MeasurementConfig, seed: int
    ) -> dict[str, float]:
        """As `jobs.evaluation.features.with_noise`."""
        part = material.train.take(slice(0, plan.outlier_images))
        test = material.test.take(slice(0, plan.corrupted_images or None))
        shares = (0.0, *plan.outlier_shares)

        def among(share: float) -> float:
            images = Labelled(with_outliers(part.images[:], share, seed), part.labels)
            net = self._learn(images, self.settings(chosen, None), material, seed)
            return accuracy(predict(net, test.images), test.labels)

        values = dict(run_in_threads([partial(among, share) for share in shares], torch.get_num_threads()))
        return {f"{share:g}": values[index] for index, share in enumerate(shares)}


def corrupted_accuracy(net: LeNet, material: Material, count: int) -> dict[str, float]:
    """`under_corruption` of a network."""
    [values] = under_corruption(lambda images: [predict(net, images)], material, count)
    return values


def transferred(
    net: LeNet, other: Material, source: InputConfig, budgets: tuple[int | None, ...], seed: int
) -> dict[str, float]:
    """`transfer_accuracy` of the output of a network's convolutions."""
    parts = [encode(net, resized(part.images, source)) for part in (other.train, other.held_out, other.test)]
    return transfer_accuracy(parts, other, budgets, seed)


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
