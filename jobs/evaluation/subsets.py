"""Which training images may be learnt from, which are held out for choices, and which of them have labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.order import stratified_subset

BUDGETS: tuple[int | None, ...] = (10, 50, 100, 1000, None)
"""Labels per class of an evaluation, smallest first; None for all."""

HELD_OUT = 5000
"""Images held out of a large training set."""


@dataclass(frozen=True)
class Split:
    """Training images to learn from and those to choose with, as slices: views, not copies, of the images.

    Attributes
    ----------
    train: the first images.
    held_out: the last ones.
    """

    train: slice
    held_out: slice

    @classmethod
    def of(cls, num_images: int, held_out: int | None = None) -> Split:
        """The last `held_out` of the training images are held out; None: a tenth, at most `HELD_OUT`.

        >>> Split.of(60_000)
        Split(train=slice(0, 55000, None), held_out=slice(55000, 60000, None))

        Raises
        ------
        ValueError
            Nothing would be left on one side.
        """
        count = min(HELD_OUT, num_images // 10) if held_out is None else held_out
        if not 0 < count < num_images:
            raise ValueError(f"held_out: expected 1 to {num_images - 1} of {num_images} training images, got {count}")
        return cls(slice(0, num_images - count), slice(num_images - count, num_images))


def label_subset(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Indices, ascending int64, of the images whose labels a budget gives.

    Parameters
    ----------
    labels: [N], of all training images.
    per_class: so many of every class, drawn by the seed; the subset of a smaller budget is contained in it. None: all.

    Raises
    ------
    ValueError
        A class has fewer.
    """
    return torch.arange(len(labels)) if per_class is None else stratified_subset(labels, per_class, seed)


def possible_budgets(labels: Tensor, budgets: Sequence[int | None] = BUDGETS) -> tuple[int | None, ...]:
    """Those of the budgets for which every class in `labels` [N] has enough: 8 × 8 digits have no 1,000 per class."""
    rarest = int(torch.unique(labels, return_counts=True)[1].min())
    return tuple(budget for budget in budgets if budget is None or budget <= rarest)
