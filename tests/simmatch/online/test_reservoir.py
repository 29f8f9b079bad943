"""The reservoir: balanced over classes, random within each, in any split into batches."""

from __future__ import annotations

import pytest
import torch

from simmatch.online.reservoir import Reservoir

COUNTS = (120, 60, 15, 5)


def labels(seed: int) -> torch.Tensor:
    order = torch.randperm(sum(COUNTS), generator=torch.Generator().manual_seed(seed))
    return torch.arange(4).repeat_interleave(torch.tensor(COUNTS))[order]


@pytest.mark.parametrize("batch", [1, 7, 50, 200])
def test_what_is_held_does_not_depend_on_the_batches(batch: int) -> None:
    """Against all records at once; restored after half of them."""
    inputs, given, weights = torch.arange(400.0).reshape(200, 2), labels(1), torch.rand(200)
    whole, parts = Reservoir(30, seed=3), Reservoir(30, seed=3)
    whole.add(inputs, given, weights)
    for number, some in enumerate(torch.split(torch.arange(200), batch)):
        if number == 100 // batch:
            restored = Reservoir(30, seed=3)
            restored.restore(parts.state())
            parts = restored
        parts.add(inputs[some], given[some], weights[some])
    assert parts.state().keys() == whole.state().keys()
    for name, value in whole.state().items():
        assert torch.equal(value, parts.state()[name]), name
    held = whole.numbers
    assert len(set(held.tolist())) == 30
    assert torch.equal(whole.inputs, inputs[held])  # type: ignore[arg-type]
    assert torch.equal(whole.labels, given[held])
    assert torch.equal(whole.weights.float(), weights[held])
    assert torch.equal(whole.ages, 199 - held)


def test_rare_classes_are_held_whole_and_the_others_share_the_rest() -> None:
    for seed in range(20):
        reservoir = Reservoir(40, seed)
        reservoir.add(torch.zeros(200, 1), labels(seed))
        held = reservoir.labels.bincount(minlength=4).tolist()
        assert held[3] == 5
        assert max(held[:3]) - min(held[:3]) <= 1
        assert reservoir.seen.tolist() == list(COUNTS)


def test_every_record_of_a_class_is_as_likely_to_be_held() -> None:
    """Two classes with 30 and 10 records, 10 places, 2,000 seeds: a record of the first is held 333 times, one of the
    second 1,000 times, give or take 5 deviations."""
    given = (torch.arange(40) % 4 == 3).long()
    held = torch.zeros(40)
    for seed in range(2000):
        reservoir = Reservoir(10, seed)
        reservoir.add(torch.zeros(40, 1), given)
        held[reservoir.numbers] += 1
    for label, share in ((0, 5 / 30), (1, 5 / 10)):
        expected, deviation = 2000 * share, (2000 * share * (1 - share)) ** 0.5
        assert (held[given == label] - expected).abs().max() < 5 * deviation
