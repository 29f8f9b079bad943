"""One row of features without backpropagated labels: learn, encode, read out at every budget, on shifted data too.

All learners of features take this path, similarity matching as its rivals: the same images in the same order, the same
pooling, the same readout, the same choice of settings on held-out images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from jobs.evaluation.config import CANDIDATES
from jobs.evaluation.interface import Cost, Learner, Shape
from jobs.evaluation.kernel_readout import LANDMARKS, PENALTIES, WIDTHS, Kernel, choose_kernel
from jobs.evaluation.material import Material, corrupted, resized, with_outliers
from jobs.evaluation.readouts import (
    LOGISTIC_PENALTIES,
    Linear,
    Scaling,
    accuracy_of,
    choose,
    choose_ridge,
    logistic_path,
    neighbours_accuracy,
)
from jobs.evaluation.results import Result, budget_name
from jobs.evaluation.stacks import BATCH, Seen, StackLearner, unseen
from simmatch.config import ModelConfig
from simmatch.data.order import stratified_subset
from simmatch.model import InputConfig

TUNING_SUBSETS = 4
"""Label subsets of a small budget by which settings are judged."""

FEW = 2000
"""Labelled images up to which a kernel readout is cheap enough for every seed."""


class Features(Protocol):
    """A learner as the evaluation sees it: blocks of features, one a layer, that rows put side by side."""

    def fit(self, images: Tensor, labels: Tensor, depth: int | None = None) -> None:
        """Learn the first `depth` blocks, or all; labels are for supervised layers."""

    def outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Features [N, F] of each block, and class scores where the learner itself decides."""

    def cost(self, depth: int) -> Cost:
        """Of the first `depth` blocks."""

    def seconds(self, depth: int) -> tuple[float, float]:
        """That learning took, and encoding what was encoded last; of the first `depth` blocks."""

    def active(self) -> list[float]:
        """Share of nonzero activities per block over the images encoded last; empty where nobody counts."""


class StackFeatures:
    """A similarity-matching stack; a block a layer, averaged down to maps of `pool`."""

    def __init__(self, config: ModelConfig, source: InputConfig, pool: int, seed: int, seen: Seen) -> None:
        self.learner = StackLearner(config, source, seed, seen, pool=pool)

    def fit(self, images: Tensor, labels: Tensor, depth: int | None = None) -> None:
        self.learner.fit(images, labels, depth)

    def outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return self.learner.outputs(images)

    def cost(self, depth: int) -> Cost:
        return self.learner.cost(depth)

    def seconds(self, depth: int) -> tuple[float, float]:
        return sum(self.learner.fit_seconds[:depth]), sum(self.learner.encode_seconds[:depth])

    def active(self) -> list[float]:
        return self.learner.active_fraction


class PooledFeatures:
    """A rival: one block, its maps average-pooled."""

    def __init__(self, learner: Learner, shape: Shape, image_size: tuple[int, int], seen: Seen) -> None:
        self.learner, self.shape, self.image_size, self.seen = learner, shape, image_size, seen
        self._active: list[float] = []
        self._fit_seconds = self._encode_seconds = 0.0

    def fit(self, images: Tensor, labels: Tensor, depth: int | None = None) -> None:
        started = time.monotonic()
        self.learner.fit(images)
        self._fit_seconds = time.monotonic() - started

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        features, active, started = [], 0.0, time.monotonic()
        for x in torch.split(images, BATCH):
            maps = self.learner.maps(x)
            active += float((maps > 0).double().mean()) * len(x) / len(images)
            features.append(rearrange(F.adaptive_avg_pool2d(maps, self.shape.pool), "b k h w -> b (k h w)"))
            self.seen("encode", len(features) * BATCH, len(images))
        self._active, self._encode_seconds = [active], time.monotonic() - started
        return [torch.cat(features)], None

    def cost(self, depth: int) -> Cost:
        return self.learner.cost(self.image_size)

    def seconds(self, depth: int) -> tuple[float, float]:
        return self._fit_seconds, self._encode_seconds

    def active(self) -> list[float]:
        return self._active


class Pixels:
    """No learner at all: the images themselves."""

    def fit(self, images: Tensor, labels: Tensor, depth: int | None = None) -> None:
        pass

    def outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return [rearrange(images, "b c h w -> b (c h w)")], None

    def cost(self, depth: int) -> Cost:
        return Cost(0, 0, 0)

    def seconds(self, depth: int) -> tuple[float, float]:
        return 0.0, 0.0

    def active(self) -> list[float]:
        return []


@dataclass(frozen=True)
class View:
    """A row of the table: blocks of a learner side by side, each divided by its mean over the training images.

    Attributes
    ----------
    blocks: which, from 0.
    """

    name: str
    blocks: tuple[int, ...] = (0,)

    @property
    def depth(self) -> int:
        """Blocks that must be computed."""
        return max(self.blocks) + 1

    def scales(self, blocks: list[Tensor]) -> list[float]:
        """Mean of each block that is looked at; 1 for a silent one."""
        return [float(blocks[index].mean()) or 1.0 for index in self.blocks]

    def of(self, blocks: list[Tensor], scales: list[float]) -> Tensor:
        """[N, F]."""
        parts = [blocks[index] / scale for index, scale in zip(self.blocks, scales, strict=True)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class FeatureRow:
    """A learner with its rows: how it is made, and the settings to choose from.

    Attributes
    ----------
    views: settings are chosen by what all of them give.
    settings: a word on each.
    make: (settings' index, seed, seen) → a fresh learner.
    decoding: the row of what the learner itself decides, beside those of its views; None where it decides nothing.
    definition: what it is made of, as plain values.
    """

    name: str
    views: tuple[View, ...]
    settings: tuple[str, ...]
    make: Callable[[int, int, Seen], Features]
    decoding: str | None = None
    definition: object = None

    @property
    def depth(self) -> int:
        """Blocks that the views look at; others are learnt for what they decide themselves."""
        return max(view.depth for view in self.views)


@dataclass(frozen=True)
class Plan:
    """What is measured; see `jobs.evaluation.config.EvaluationConfig`."""

    budgets: tuple[int | None, ...]
    tuning_images: int
    corrupted_images: int
    outlier_shares: tuple[float, ...]
    outlier_images: int
    candidates: int = CANDIDATES


def tune(row: FeatureRow, material: Material, plan: Plan, seed: int, seen: Seen = unseen) -> int:
    """Index of the settings that do best on held-out images after learning from the first `tuning_images`.

    Judged by the accuracies of its views' ridge readouts with all labels of those images and with the two smallest
    budgets, the mean of `TUNING_SUBSETS` label subsets each: one subset of a few labels says little about settings.
    """
    if len(row.settings) == 1:
        return 0
    train = material.train.take(slice(0, plan.tuning_images))
    least = int(torch.bincount(train.labels).min())
    few = [budget for budget in plan.budgets[:2] if budget is not None and budget <= least]
    judged = [(torch.arange(len(train)), 1.0)]
    for budget in few:
        drawn = (stratified_subset(train.labels, budget, seed + place) for place in range(TUNING_SUBSETS))
        judged += [(subset, 1 / TUNING_SUBSETS) for subset in drawn]
    best, chosen = -1.0, 0
    for index, words in enumerate(row.settings):
        seen(f"try {words}", index, len(row.settings))
        learner = row.make(index, seed, unseen)
        learner.fit(train.images, train.labels, row.depth)
        blocks, held_out = learner.outputs(train.images)[0], learner.outputs(material.held_out.images)[0]
        right = 0.0
        for view in row.views:
            scales = view.scales(blocks)
            features, others = view.of(blocks, scales), view.of(held_out, scales)
            for subset, weight in judged:
                labelled = features[subset], train.labels[subset]
                right += (
                    weight * choose_ridge(labelled, (others, material.held_out.labels), material.source.num_classes)[1]
                )
        if right > best:
            best, chosen = right, index
    return chosen


@dataclass(frozen=True)
class Reading:
    """A row's readout of all labels, to be used on other images."""

    view: View
    scales: list[float]
    readout: Linear

    def scores(self, blocks: list[Tensor]) -> Tensor:
        return self.readout.scores(self.view.of(blocks, self.scales))


def evaluate(
    row: FeatureRow,
    chosen: int,
    material: Material,
    plan: Plan,
    seed: int,
    seen: Seen = unseen,
    *,
    every_readout: bool = True,
) -> tuple[list[Result], Features, list[Reading]]:
    """Learn with one seed and read out at every budget: a result and a readout for each view, and the learner.

    A learner that decides by itself adds a result, the last one, of all its blocks.

    every_readout: besides ridge, which every budget gets, and a kernel where labelled images are few, a kernel for the
    rest, logistic regression and nearest neighbours.
    """
    learner = row.make(chosen, seed, seen)
    learner.fit(material.train.images, material.train.labels)
    train, held_out = learner.outputs(material.train.images)[0], learner.outputs(material.held_out.images)[0]
    test, scores = learner.outputs(material.test.images)

    def result_of(name: str, features: int, depth: int) -> Result:
        cost, (fit_seconds, encode_seconds) = learner.cost(depth), learner.seconds(depth)
        return Result(
            row=name,
            seed=seed,
            settings=row.settings[chosen],
            features=features,
            parameters_trained=cost.trained,
            parameters_inference=cost.inference,
            operations=cost.operations,
            fit_seconds=fit_seconds,
            images_per_second=len(material.test) / max(encode_seconds, 1e-9),
            active_fraction=learner.active()[:depth],
        )

    results, readings = [], []
    for view in row.views:
        seen(f"read out {view.name}", 0, 1)
        scales = view.scales(train)
        parts = [view.of(blocks, scales) for blocks in (train, held_out, test)]
        result = result_of(view.name, parts[0].shape[1], view.depth)
        most = len(material.train) if every_readout else FEW
        readout = _at_budgets(result, parts, material, plan.budgets, seed, most)
        if every_readout:
            _other_readouts(result, parts, material, readout.scaling)
        results.append(result)
        readings.append(Reading(view, scales, readout))
    if row.decoding is not None:
        assert scores is not None
        results.append(result_of(row.decoding, test[-1].shape[1], len(test)))
        results[-1].decode = accuracy_of(scores, material.test.labels)
    return results, learner, readings


def _at_budgets(
    result: Result, parts: list[Tensor], material: Material, budgets: tuple[int | None, ...], seed: int, most: int
) -> Linear:
    """Fill in accuracies from the features of train, held-out and test images; the linear readout of all labels.

    most: labelled images that a kernel readout is given. Where it needs landmarks it takes width and penalty of the
    budget before, for a search would take minutes.
    """
    train, test, classes = parts[0], parts[2], material.source.num_classes
    held_out = parts[1], material.held_out.labels
    kernel: Kernel | None = None
    for budget in budgets:
        name, index = budget_name(budget), material.labelled(budget, seed)
        labelled = train[index], material.train.labels[index]
        readout, result.held_out[name] = choose_ridge(labelled, held_out, classes)
        result.accuracy[name] = accuracy_of(readout.scores(test), material.test.labels)
        if len(index) <= most:
            widths: Sequence[float] = WIDTHS
            penalties: Sequence[float] = PENALTIES
            scaling = readout.scaling
            if kernel is not None and len(index) > LANDMARKS:
                widths, penalties = (kernel.width,), (kernel.penalty,)
            kernel, result.held_out[f"kernel {name}"] = choose_kernel(
                labelled, held_out, classes, scaling, widths=widths, penalties=penalties
            )
            result.kernel[name] = accuracy_of(kernel.scores(test), material.test.labels)
    result.parameters_readout = readout.parameters
    return readout


def _other_readouts(result: Result, parts: list[Tensor], material: Material, scaling: Scaling) -> None:
    """Fill in what logistic regression and nearest neighbours make of all labels."""
    train, held_out, test = parts
    classes = material.source.num_classes
    if classes > 2:
        path = logistic_path(train, material.train.labels, classes, scaling, penalties=LOGISTIC_PENALTIES)
        logistic, result.held_out["logistic"] = choose(path, (held_out, material.held_out.labels))
        result.logistic = accuracy_of(logistic.scores(test), material.test.labels)
    result.neighbours = neighbours_accuracy((train, material.train.labels), (test, material.test.labels), classes)


def under_corruption(
    learner: Features, readings: list[Reading], material: Material, count: int
) -> list[dict[str, float]]:
    """Accuracy of each reading under each corruption, and under none: `clean`."""
    images = {"clean": material.test.take(slice(0, count))} | corrupted(material.test, count, seed=0)
    found: list[dict[str, float]] = [{} for _ in readings]
    for name, each in images.items():
        blocks = learner.outputs(each.images)[0]
        for values, reading in zip(found, readings, strict=True):
            values[name] = accuracy_of(reading.scores(blocks), each.labels)
    return found


def transferred(
    learner: Features,
    views: tuple[View, ...],
    other: Material,
    source: InputConfig,
    budgets: tuple[int | None, ...],
    seed: int,
) -> list[dict[str, float]]:
    """Test accuracy on a data set that the learner has not seen, by readouts trained on its labels; for each view.

    Budgets that a class cannot fill are left out.
    """
    blocks = [learner.outputs(resized(part.images, source))[0] for part in (other.train, other.held_out, other.test)]
    least = int(torch.bincount(other.train.labels).min())
    found = []
    for view in views:
        scales = view.scales(blocks[0])
        train, held_out, test = (view.of(each, scales) for each in blocks)
        values: dict[str, float] = {}
        for budget in (each for each in budgets if each is None or each <= least):
            index = other.labelled(budget, seed)
            readout, _ = choose_ridge(
                (train[index], other.train.labels[index]), (held_out, other.held_out.labels), other.source.num_classes
            )
            values[budget_name(budget)] = accuracy_of(readout.scores(test), other.test.labels)
        found.append(values)
    return found


def with_noise(row: FeatureRow, chosen: int, material: Material, plan: Plan, seed: int) -> list[dict[str, float]]:
    """Test accuracy after learning, and reading out, from images of which a share is noise; '0' for none; per view.

    The first `outlier_images` training images, noise keeping the label of the image that it replaces; the penalty is
    chosen on as many held-out images as there are test images.
    """
    train = material.train.take(slice(0, plan.outlier_images))
    held_out, test = (each.take(slice(0, plan.corrupted_images or None)) for each in (material.held_out, material.test))
    found: list[dict[str, float]] = [{} for _ in row.views]
    for share in (0.0, *plan.outlier_shares):
        images = with_outliers(train.images, share, seed)
        learner = row.make(chosen, seed, unseen)
        learner.fit(images, train.labels, row.depth)
        blocks = [learner.outputs(each)[0] for each in (images, held_out.images, test.images)]
        for values, view in zip(found, row.views, strict=True):
            scales = view.scales(blocks[0])
            parts = [view.of(each, scales) for each in blocks]
            readout, _ = choose_ridge(
                (parts[0], train.labels), (parts[1], held_out.labels), material.source.num_classes
            )
            values[f"{share:g}"] = accuracy_of(readout.scores(parts[2]), test.labels)
    return found
