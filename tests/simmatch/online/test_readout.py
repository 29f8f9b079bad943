"""The readout that learns online, against a ridge regression of all records at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simmatch.labels import UNLABELLED
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.readout import fit_ridge
from simmatch.seeding import seeded


def records(count: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features far from the origin, of two scales, one of them constant; classes appear one after the other."""
    generator = seeded("online", count, features)
    labels = (torch.rand(count, generator=generator) * torch.linspace(1, classes, count).clamp(min=1)).long()
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    x[:, : features // 2] += labels[:, None]
    x[:, -1] = 4.0
    return 50 + x * torch.linspace(0.01, 3, features, dtype=torch.float64), labels


def weighted_ridge(x: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Scores x A + b of least squares with a penalty on standardised features, by an augmented system."""
    targets = 2 * torch.nn.functional.one_hot(labels).double() - 1
    share = weights.double() / weights.sum()
    mean, bias = share @ x, share @ targets
    deviation = (share @ (x - mean).square()).sqrt()
    deviation[deviation < 1e-12] = 1.0
    scaled = (x - mean) / deviation
    rows = torch.cat([scaled * share.sqrt()[:, None], penalty**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    right = torch.cat([(targets - bias) * share.sqrt()[:, None], torch.zeros(x.shape[1], targets.shape[1])])
    matrix = torch.linalg.lstsq(rows, right).solution / deviation[:, None]
    return matrix, bias - mean @ matrix


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("features", [5, 40])
def test_after_a_factorisation_it_is_the_ridge_of_all_records(batch: int, features: int) -> None:
    """Exact, with classes that appear late: their targets for earlier records are known."""
    x, labels = records(400, features, 4)
    readout = OnlineReadout(features, ReadoutConfig())
    for part, some in zip(torch.split(x, batch), torch.split(labels, batch), strict=True):
        readout.learn(part, some)
    readout._moments.scatter.addmm_(readout._pending.T, readout._pending)
    readout._factorise()
    expected = fit_ridge(x, labels)
    found = readout.scores(x)
    assert found is not None
    torch.testing.assert_close(found, expected.scores(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("batch", "forgetting"), [(1, 1.0), (1, 0.99), (5, 1.0), (5, 0.99), (64, 0.999)])
def test_between_factorisations_records_count_at_once(batch: int, forgetting: float) -> None:
    """With a penalty too small to matter: that it is lazy shows nowhere. Weights of records, some of them 0, and
    records without labels among the others."""
    x, labels = records(400, 30, 3)
    weights = torch.rand(400, generator=seeded("weights")) * (torch.arange(400) % 5 > 0)
    readout = OnlineReadout(30, ReadoutConfig(penalty=1e-12, forgetting=forgetting))
    waited = 0
    for start in range(0, 400, batch):
        some = slice(start, start + batch)
        given = torch.where(torch.arange(400)[some] % 7 == 3, UNLABELLED, labels[some])
        readout.learn(x[some], given, weights[some])
        waited += len(readout._pending) > 0
        if start < 200 or start // batch % 10:
            continue
        seen = torch.arange(min(start + batch, 400))
        seen = seen[(seen % 7 != 3) & (weights[seen] > 0)]
        ages = torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
        matrix, bias = weighted_ridge(x[seen], labels[seen], weights[seen] * forgetting**ages, 1e-12)
        found = readout.scores(x)
        assert found is not None
        torch.testing.assert_close(found, x @ matrix + bias, rtol=0, atol=1e-5)
    assert waited > 0 or batch == 64


@pytest.mark.parametrize("reservoir", [0, 20])
def test_a_restored_readout_goes_on_with_the_same_bits(reservoir: int) -> None:
    x, labels = records(300, 24, 5)
    config = ReadoutConfig(forgetting=0.995, reservoir=reservoir)
    whole, second = OnlineReadout(24, config), OnlineReadout(24, config)
    for start in range(0, 300, 3):
        if start == 150:
            second.restore({name: value.clone() for name, value in whole.state().items()})
        for each in (whole, second) if start >= 150 else (whole,):
            each.learn(x[start : start + 3], labels[start : start + 3], inputs=x[start : start + 3])
        if start >= 150:
            found, again = whole.scores(x), second.scores(x)
            assert found is not None
            assert again is not None
            assert torch.equal(found, again)
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    assert whole.nbytes == sum(value.nbytes for value in whole.state().values())


def test_there_are_no_scores_before_two_classes() -> None:
    readout = OnlineReadout(2, ReadoutConfig())
    assert readout.scores(torch.zeros(1, 2)) is None
    readout.learn(torch.ones(3, 2), torch.tensor([UNLABELLED, 0, 0]))
    assert readout.scores(torch.zeros(1, 2)) is None
    readout.learn(torch.zeros(1, 2), torch.tensor([1]))
    assert readout.scores(torch.zeros(4, 2)).shape == (4, 2)  # type: ignore[union-attr]
