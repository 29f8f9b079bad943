"""The reservoir: every record is as likely to be held as any other, in any split into batches."""

from __future__ import annotations

import pytest
import torch

from simmatch.online.reservoir import Reservoir


@pytest.mark.parametrize("batch", [1, 7, 50, 200])
def test_what_is_held_does_not_depend_on_the_batches(batch: int) -> None:
    """Oracle: algorithm R one record at a time."""
    inputs, labels = torch.arange(400.0).reshape(200, 2), torch.arange(200)
    reservoir, one = Reservoir(30, seed=3), Reservoir(30, seed=3)
    for x, y in zip(torch.split(inputs, batch), torch.split(labels, batch), strict=True):
        reservoir.add(x, y)
    for number in range(200):
        one.add(inputs[number : number + 1], labels[number : number + 1])
    assert reservoir.inputs is not None
    assert one.inputs is not None
    assert torch.equal(reservoir.inputs, one.inputs)
    assert torch.equal(reservoir.labels, one.labels)
    assert torch.equal(reservoir.inputs[:, 0] / 2, reservoir.labels.float())
    assert len(set(reservoir.labels.tolist())) == 30


def test_every_record_is_as_likely_to_be_held() -> None:
    """10 of 40, 4,000 seeds: each is held 1,000 times, give or take 5 deviations of 27."""
    held = torch.zeros(40)
    for seed in range(4000):
        reservoir = Reservoir(10, seed)
        reservoir.add(torch.zeros(40, 1), torch.arange(40))
        held[reservoir.labels] += 1
    assert (held - 1000).abs().max() < 137
