"""Order against its definition, its purity and its golden values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from simmatch.data.order import Batches, epoch_order, steps_per_epoch, stratified_subset


def test_epoch_order_is_a_pure_permutation():
    torch.manual_seed(1)
    first = epoch_order(1000, seed=3, epoch=0)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(first, epoch_order(1000, seed=3, epoch=0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(epoch_order(1000, seed=3, epoch=0, images=10), first[:10])
    # two random permutations of 1000 agree in about one place
    for other in (epoch_order(1000, seed=3, epoch=1), epoch_order(1000, seed=4, epoch=0)):
        assert (other == first).sum() < 10


def test_epoch_order_golden():
    """A resumed run relies on this order: it may not change from release to release."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [5, 4, 7, 2, 3, 0, 6, 1]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [4, 6, 1, 5, 2, 7, 0, 3]


@pytest.mark.parametrize(("images", "batch_size"), [(None, 7), (None, 5), (11, 4), (3, 100)])
def test_batches_are_the_epochs_in_pieces(images, batch_size):
    batches = Batches(30, batch_size, epochs=3, seed=5, images=images)
    steps = steps_per_epoch(30, batch_size, images=images)
    assert steps == math.ceil((images or 30) / batch_size)
    assert (batches.per_epoch, len(batches)) == (steps, 3 * steps)
    in_order = [batches[update] for update in range(len(batches))]
    expected = [epoch_order(30, seed=5, epoch=epoch, images=images).split(batch_size) for epoch in range(3)]
    for batch, piece in zip(in_order, itertools.chain(*expected), strict=True):
        assert torch.equal(batch, piece)


def test_order_refuses_impossible_counts():
    with pytest.raises(ValueError, match="expected 1 to 10 images per epoch, got 11"):
        epoch_order(10, seed=0, epoch=0, images=11)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        steps_per_epoch(10, 0)


def test_stratified_subset():
    labels = torch.arange(90) % 3
    few, more = stratified_subset(labels, 4, seed=1), stratified_subset(labels, 9, seed=1)
    assert torch.equal(torch.bincount(labels[few]), torch.tensor([4, 4, 4]))
    assert torch.equal(few, few.unique())
    assert set(few.tolist()) < set(more.tolist())
    assert not torch.equal(few, stratified_subset(labels, 4, seed=2))
    with pytest.raises(ValueError, match="expected 31 examples of class 0, got 30"):
        stratified_subset(labels, 31, seed=1)


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    batches = Batches(103, 20, epochs=3, seed=4, images=50)
    in_order = [batches[update] for update in range(len(batches))]
    for update in (8, 0, 4, 3, 8):
        assert torch.equal(batches[update], in_order[update])
    for update in (-1, len(batches)):
        with pytest.raises(IndexError, match=f"got {update}$"):
            batches[update]
