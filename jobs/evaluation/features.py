"""A row of features learnt without backpropagation: learn, encode, read out at every budget and on other images.

All learners of features take this path, similarity matching and its rivals: the same images in the same order, the same
pooling, the same readouts, the same choice of settings on held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.evaluation.config import MeasurementConfig
from jobs.evaluation.kernel_readout import LANDMARKS, PENALTIES, WIDTHS, KernelReadout, choose_kernel
from jobs.evaluation.learners import FeatureLearner, OnProgress, no_progress
from jobs.evaluation.material import Material, UnitImages, resized, with_outliers
from jobs.evaluation.readouts import (
    LOGISTIC_PENALTIES,
    LinearReadout,
    Scaling,
    choose,
    choose_ridge,
    logistic_path,
    neighbours_accuracy,
)
from jobs.evaluation.results import RowResult, budget_name
from jobs.evaluation.robustness import transfer_accuracy, under_corruption
from simmatch.data.order import stratified_subset
from simmatch.model import InputConfig
from simmatch.readout import accuracy

TUNING_SUBSETS = 4
"""Label subsets of a small budget by which settings are judged."""

FEW = 2000
"""Labelled images up to which a kernel readout is cheap enough for every seed."""


@dataclass(frozen=True)
class FeatureView:
    """A line of the table: blocks of a learner side by side, each divided by its mean over the training images.

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
        """Mean of each block of the view; 1 if it is 0."""
        return [float(blocks[index].mean()) or 1.0 for index in self.blocks]

    def of(self, blocks: list[Tensor], scales: list[float]) -> Tensor:
        """[N, F]."""
        parts = [blocks[index] / scale for index, scale in zip(self.blocks, scales, strict=True)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def of_parts(self, *parts: list[Tensor]) -> list[Tensor]:
        """[N, F] of each part; the scales are those of the first, the training images."""
        scales = self.scales(parts[0])
        return [self.of(blocks, scales) for blocks in parts]


@dataclass(frozen=True)
class FeatureRow:
    """A learner with its views, and the settings to choose from.

    Attributes
    ----------
    views: settings are chosen by the accuracies of all of them.
    settings: a description of each.
    make: (index of the settings, seed, on_progress) → a new learner.
    decoding: the line of the table for what the learner itself decides; None if it decides nothing.
    definition: what the row is made of, as plain values.
    values: of an image, in each block of the learner and between its layers, for the largest of the settings; see
        `jobs.evaluation.memory.stack_values`.
    """

    name: str
    views: tuple[FeatureView, ...]
    settings: tuple[str, ...]
    make: Callable[[int, int, OnProgress], FeatureLearner]
    decoding: str | None = None
    definition: object = None
    values: Callable[[], tuple[list[int], int]] = lambda: ([0], 0)

    @property
    def depth(self) -> int:
        """Blocks that the views use; others are learnt for `decoding`."""
        return max(view.depth for view in self.views)


def tune(
    row: FeatureRow, material: Material, plan: MeasurementConfig, seed: int, on_progress: OnProgress = no_progress
) -> int:
    """Index of the settings that do best on held-out images after learning from the first `tuning_images`.

    Judged by the accuracies of its views' ridge readouts with all labels of those images and with the two smallest
    budgets, the mean of `TUNING_SUBSETS` label subsets each: one subset of a few labels says little about settings.
    """
    if len(row.settings) == 1:
        return 0
    train = material.train.take(slice(0, plan.tuning_images))
    least = int(torch.bincount(train.labels).min())
    few = [budget for budget in plan.budgets[:2] if budget <= least]
    judged = [(torch.arange(len(train)), 1.0)]
    for budget in few:
        subsets = (stratified_subset(train.labels, budget, seed + number) for number in range(TUNING_SUBSETS))
        judged += [(subset, 1 / TUNING_SUBSETS) for subset in subsets]
    best, chosen = -1.0, 0
    for index, words in enumerate(row.settings):
        on_progress(f"try {words}", index, len(row.settings))
        learner = row.make(index, seed, no_progress)
        learner.fit(train.images, train.labels, row.depth)
        blocks, held_out = learner.outputs(train.images)[0], learner.outputs(material.held_out.images)[0]
        right = 0.0
        for view in row.views:
            features, others = view.of_parts(blocks, held_out)
            for subset, weight in judged:
                labelled = features[subset], train.labels[subset]
                _, share = choose_ridge(labelled, (others, material.held_out.labels), material.source.num_classes)
                right += weight * share
        if right > best:
            best, chosen = right, index
    return chosen


@dataclass(frozen=True)
class FittedView:
    """A view with its readout of all labels, to be used on other images."""

    view: FeatureView
    scales: list[float]
    readout: LinearReadout

    def scores(self, blocks: list[Tensor]) -> Tensor:
        """[N, classes]."""
        return self.readout.scores(self.view.of(blocks, self.scales))


def evaluate(
    row: FeatureRow,
    chosen: int,
    material: Material,
    plan: MeasurementConfig,
    seed: int,
    on_progress: OnProgress = no_progress,
    *,
    every_readout: bool = True,
) -> tuple[list[RowResult], FeatureLearner, list[FittedView]]:
    """Learn with one seed and read out at every budget: a result and a readout for each view, and the learner.

    A learner that decides by itself adds a result, the last one, of all its blocks.

    every_readout: besides ridge, which every budget gets, and a kernel readout if labelled images are few, a kernel
    readout of the other budgets, logistic regression and nearest neighbours. None of these if the plan is `ridge_only`.
    """
    every_readout = every_readout and not plan.ridge_only
    few = 0 if plan.ridge_only else FEW
    learner = row.make(chosen, seed, on_progress)
    learner.fit(material.train.images, material.train.labels)
    train, held_out = learner.outputs(material.train.images)[0], learner.outputs(material.held_out.images)[0]
    test, scores = learner.outputs(material.test.images)

    def result_of(name: str, features: int, depth: int) -> RowResult:
        cost, (fit_seconds, encode_seconds) = learner.cost(depth), learner.seconds(depth)
        return RowResult(
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

    results, fitted = [], []
    for view in row.views:
        on_progress(f"read out {view.name}", 0, 1)
        parts = view.of_parts(train, held_out, test)
        result = result_of(view.name, parts[0].shape[1], view.depth)
        most = len(material.train) if every_readout else few
        readout = _at_budgets(result, parts, material, plan.all_budgets(), most)
        if every_readout:
            _other_readouts(result, parts, material, readout.scaling)
        results.append(result)
        fitted.append(FittedView(view, view.scales(train), readout))
    if row.decoding is not None:
        assert scores is not None
        results.append(result_of(row.decoding, test[-1].shape[1], len(test)))
        results[-1].decode = accuracy(scores, material.test.labels)
    return results, learner, fitted


def _at_budgets(
    result: RowResult, parts: list[Tensor], material: Material, budgets: tuple[int | None, ...], most: int
) -> LinearReadout:
    """Fill in accuracies from the features of train, held-out and test images; the linear readout of all labels.

    most: labelled images that a kernel readout is given. If it needs landmarks it takes the width and penalty of the
    budget before, because a search would take minutes.
    """
    train, test, classes = parts[0], parts[2], material.source.num_classes
    held_out = parts[1], material.held_out.labels
    kernel: KernelReadout | None = None
    for budget in budgets:
        name, index = budget_name(budget), material.labelled(budget, result.seed)
        labelled = train[index], material.train.labels[index]
        readout, result.held_out[name] = choose_ridge(labelled, held_out, classes)
        result.accuracy[name] = accuracy(readout.scores(test), material.test.labels)
        if len(index) <= most:
            widths: Sequence[float] = WIDTHS
            penalties: Sequence[float] = PENALTIES
            if kernel is not None and len(index) > LANDMARKS:
                widths, penalties = (kernel.width,), (kernel.penalty,)
            kernel, result.held_out[f"kernel {name}"] = choose_kernel(
                labelled, held_out, classes, readout.scaling, widths=widths, penalties=penalties
            )
            result.kernel[name] = accuracy(kernel.scores(test), material.test.labels)
    result.parameters_readout = readout.parameters
    return readout


def _other_readouts(result: RowResult, parts: list[Tensor], material: Material, scaling: Scaling) -> None:
    """Fill in the accuracies of logistic regression and nearest neighbours with all labels."""
    train, held_out, test = parts
    classes = material.source.num_classes
    if classes > 2:
        path = logistic_path(train, material.train.labels, classes, scaling, penalties=LOGISTIC_PENALTIES)
        logistic, result.held_out["logistic"] = choose(path, (held_out, material.held_out.labels))
        result.logistic = accuracy(logistic.scores(test), material.test.labels)
    result.neighbours = neighbours_accuracy((train, material.train.labels), (test, material.test.labels), classes)


def corrupted_accuracy(
    learner: FeatureLearner, fitted: list[FittedView], material: Material, count: int
) -> list[dict[str, float]]:
    """`under_corruption` for each fitted view."""

    def scores_of(images: UnitImages) -> list[Tensor]:
        blocks = learner.outputs(images)[0]
        return [view.scores(blocks) for view in fitted]

    return under_corruption(scores_of, material, count)


def transferred(
    learner: FeatureLearner,
    views: tuple[FeatureView, ...],
    other: Material,
    source: InputConfig,
    budgets: tuple[int | None, ...],
    seed: int,
) -> list[dict[str, float]]:
    """`transfer_accuracy` for each view."""
    blocks = [learner.outputs(resized(part.images, source))[0] for part in (other.train, other.held_out, other.test)]
    return [transfer_accuracy(view.of_parts(*blocks), other, budgets, seed) for view in views]


def with_noise(
    row: FeatureRow, chosen: int, material: Material, plan: MeasurementConfig, seed: int
) -> list[dict[str, float]]:
    """Share of noise among the training images → test accuracy after learning and reading out, for each view.

    The first `outlier_images` training images, noise keeping the label of the image that it replaces; share 0 is
    included. The penalty is chosen on as many held-out images as there are test images.
    """
    train = material.train.take(slice(0, plan.outlier_images))
    held_out, test = (each.take(slice(0, plan.corrupted_images or None)) for each in (material.held_out, material.test))
    accuracies: list[dict[str, float]] = [{} for _ in row.views]
    for share in (0.0, *plan.outlier_shares):
        images = with_outliers(train.images[:], share, seed)
        learner = row.make(chosen, seed, no_progress)
        learner.fit(images, train.labels, row.depth)
        blocks = [learner.outputs(each)[0] for each in (images, held_out.images, test.images)]
        for values, view in zip(accuracies, row.views, strict=True):
            parts = view.of_parts(*blocks)
            labelled = parts[0], train.labels
            readout, _ = choose_ridge(labelled, (parts[1], held_out.labels), material.source.num_classes)
            values[f"{share:g}"] = accuracy(readout.scores(parts[2]), test.labels)
    return accuracies
