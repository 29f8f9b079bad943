"""Accuracy away from the images that were learnt from: under corruptions, and on another data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jobs.evaluation.material import Material, UnitImages, corrupted
from jobs.evaluation.readouts import choose_ridge
from jobs.evaluation.results import CLEAN, budget_name
from simmatch.readout import accuracy


def under_corruption(
    scores_of: Callable[[UnitImages], Sequence[Tensor]], material: Material, count: int
) -> list[dict[str, float]]:
    """Accuracy under each corruption, and on the same images without one, `clean`.

    Parameters
    ----------
    scores_of: images → scores [N, classes] of one or more readouts.
    count: test images, the first ones.

    Returns
    -------
    A mapping corruption → accuracy for each readout.
    """
    images = {CLEAN: material.test.take(slice(0, count))} | corrupted(material.test, count, seed=0)
    by_name = {
        name: [accuracy(scores, part.labels) for scores in scores_of(part.images)] for name, part in images.items()
    }
    return [dict(zip(by_name, values, strict=True)) for values in zip(*by_name.values(), strict=True)]


def transfer_accuracy(
    features: Sequence[Tensor], other: Material, budgets: Sequence[int | None], seed: int
) -> dict[str, float]:
    """Budget → test accuracy on a data set that the learner has not seen, by readouts trained on its labels.

    Budgets that a class cannot fill are left out.

    features: [N, F] of the training, held-out and test images of `other`.
    """
    train, held_out, test = features
    least = int(torch.bincount(other.train.labels).min())
    values = {}
    for budget in (each for each in budgets if each is None or each <= least):
        index = other.labelled(budget, seed)
        labelled = train[index], other.train.labels[index]
        readout, _ = choose_ridge(labelled, (held_out, other.held_out.labels), other.source.num_classes)
        values[budget_name(budget)] = accuracy(readout.scores(test), other.test.labels)
    return values
