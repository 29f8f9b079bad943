"""Class means of label-free activity, against means computed at once, over streams that are long or have few labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simmatch.labels import UNLABELLED
from simmatch.online.label_sums import LabelSums
from simmatch.readout import decode

CLASSES = 4
MEANS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])


def scores(sums: LabelSums, label: Tensor, activity: Tensor) -> Tensor:
    found = sums.scores(label, activity)
    assert found is not None
    return found


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_v_is_scaled_to_the_means_however_little_is_left_of_the_sums(batch: int, weight: float) -> None:
    """V is 5 times the class means, so that its scale is 1/5, also where less than one record of a class is left."""
    sums, label = LabelSums(MEANS.T, rate=0.1), 5 * MEANS.T
    for labels in (torch.arange(200) % CLASSES).split(batch):
        sums.add(MEANS[labels], labels, torch.full((len(labels),), weight))
    torch.testing.assert_close(scores(sums, label, MEANS), decode(MEANS, MEANS.T))


def test_a_class_that_stays_away_for_long_is_still_known() -> None:
    """0.9 to the power of 5,000 is 0 in float32."""
    sums = LabelSums(MEANS.T, rate=0.1)
    first = torch.arange(3)
    sums.add(MEANS[first], first)
    for _ in range(5_000):
        sums.add(MEANS[:1], torch.tensor([0]))
    found = scores(sums, MEANS.T, MEANS)
    torch.testing.assert_close(found[:, :3], decode(MEANS, MEANS.T)[:, :3])
    assert bool((found[:, 3] == -torch.inf).all())  # never seen


def test_there_are_no_scores_without_labels() -> None:
    sums = LabelSums(MEANS.T, rate=0.1)
    sums.add(MEANS, torch.full((CLASSES,), UNLABELLED))
    assert sums.scores(MEANS.T, MEANS) is None


def test_state_and_growth() -> None:
    sums, others = LabelSums(MEANS.T, rate=0.1), LabelSums(MEANS.T, rate=0.1)
    sums.add(MEANS, torch.arange(CLASSES))
    sums.grow(6)
    others.restore(sums.yz, sums.zz)
    assert others.yz.shape == (3, 6)
    for each in (sums, others):
        each.add(MEANS[:1], torch.tensor([5]))
    assert torch.equal(sums.yz, others.yz)
    assert torch.equal(sums.zz, others.zz)
