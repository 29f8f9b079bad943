"""Splits and label budgets: sizes, balance, nesting."""

from __future__ import annotations

import itertools

import pytest
import torch

from jobs.evaluation.subsets import BUDGETS, Split, label_subset, possible_budgets
from simmatch.data import Dataset
from simmatch.seeding import seeded


@pytest.fixture
def labels() -> torch.Tensor:
    """4,000 labels of 3 classes, unevenly: about 57, 29 and 14 %."""
    drawn = torch.randint(0, 7, (4000,), generator=seeded("labels"))
    return (drawn > 3).long() + (drawn > 5).long()


@pytest.mark.parametrize(("images", "train"), [(60_000, 55_000), (50_000, 45_000), (1437, 1294), (20_000, 18_000)])
def test_the_last_images_are_held_out(images: int, train: int) -> None:
    split, order = Split.of(images), torch.arange(images)
    assert torch.equal(torch.cat([order[split.train], order[split.held_out]]), order)
    assert len(order[split.train]) == train


def test_a_number_of_images_to_hold_out() -> None:
    assert torch.arange(20)[Split.of(20, 3).held_out].tolist() == [17, 18, 19]
    for images, held_out in ((20, 0), (20, 20), (20, -1)):
        with pytest.raises(ValueError, match=f"expected 1 to 19 of 20 training images, got {held_out}"):
            Split.of(images, held_out)
    with pytest.raises(ValueError, match="of 9 training images, got 0"):
        Split.of(9)


@pytest.mark.parametrize("per_class", [1, 10, 500])
def test_subsets_are_balanced(labels: torch.Tensor, per_class: int) -> None:
    found = label_subset(labels, per_class, seed=0)
    assert torch.bincount(labels[found]).tolist() == [per_class] * 3
    assert torch.equal(found, found.unique())


def test_small_subsets_lie_in_large_ones(labels: torch.Tensor) -> None:
    budgets = (*BUDGETS[:3], 500, None)
    for seed in range(3):
        found = [set(label_subset(labels, budget, seed).tolist()) for budget in budgets]
        assert all(small < large for small, large in itertools.pairwise(found))
        assert found[-1] == set(range(4000))


def test_subsets_depend_on_the_seed_alone(labels: torch.Tensor) -> None:
    assert torch.equal(label_subset(labels, 100, 0), label_subset(labels, 100, 0))
    # of class 0, 100 of about 2,290 are drawn: two draws share 4 on average, and more than 30 practically never
    one, other = (label_subset(labels, 100, seed) for seed in (0, 1))
    shared = set(one[labels[one] == 0].tolist()) & set(other[labels[other] == 0].tolist())
    assert len(shared) < 30


def test_a_class_with_too_few_images_is_named(labels: torch.Tensor) -> None:
    rarest = int((labels == 2).sum())
    with pytest.raises(ValueError, match=f"expected {rarest + 1} examples of class 2, got {rarest}"):
        label_subset(labels, rarest + 1, seed=0)
    assert possible_budgets(labels, (10, rarest, rarest + 1, None)) == (10, rarest, None)


def test_the_budgets_of_the_digits(digits: Dataset) -> None:
    learn = digits.train_labels[Split.of(len(digits.train_labels)).train]
    assert possible_budgets(learn) == (10, 50, 100, None)
    for budget in possible_budgets(learn):
        label_subset(learn, budget, seed=0)
