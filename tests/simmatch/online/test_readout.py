"""Readouts that learn online, against fits to all records at once: of this package, of scikit-learn, and by least
squares."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from simmatch.labels import UNLABELLED
from simmatch.online.readout import PRIOR, OnlineReadout, ReadoutConfig
from simmatch.online.state import load_state, save_state
from simmatch.readout import fit_ridge
from simmatch.seeding import seeded

KINDS = ("ridge", "discriminant")


def records(count: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features far from the origin, of two scales, one of them constant; classes appear one after the other."""
    generator = seeded("online", count, features)
    labels = (torch.rand(count, generator=generator) * torch.linspace(1, classes, count).clamp(min=1)).long()
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    x[:, : features // 2] += labels[:, None]
    x[:, -1] = 4.0
    return 50 + x * torch.linspace(0.01, 3, features, dtype=torch.float64), labels


def learnt(x: Tensor, labels: Tensor, batch: int, config: ReadoutConfig) -> OnlineReadout:
    readout = OnlineReadout(x.shape[1], config)
    for part, some in zip(torch.split(x, batch), torch.split(labels, batch), strict=True):
        readout.learn(part, some)
    return readout


def found(readout: OnlineReadout, x: Tensor) -> Tensor:
    scores = readout.scores(x)
    assert scores is not None
    return scores


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("features", [5, 40])
def test_after_a_factorisation_it_is_the_ridge_of_all_records(batch: int, features: int) -> None:
    """Exact, with classes that appear late: their targets for earlier records are known."""
    x, labels = records(400, features, 4)
    readout = learnt(x[:300], labels[:300], batch, ReadoutConfig(kind="ridge", penalty=0.01, initial_penalty=0))
    readout.learn(x[300:], labels[300:])  # more than may wait
    torch.testing.assert_close(found(readout, x), fit_ridge(x, labels).scores(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_it_is_the_discriminant_analysis_of_scikit_learn(batch: int) -> None:
    """Its covariance within classes is divided by n as ours. Scores agree up to a number for each record."""
    x, labels = records(400, 12, 4)
    x = x[:, :-1]
    readout = learnt(x, labels, batch, ReadoutConfig(penalty=1e-12, initial_penalty=0))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=EmpiricalCovariance())
    expected = torch.from_numpy(theirs.fit(x.numpy(), labels.numpy()).predict_log_proba(x.numpy()))
    counts = labels.bincount()
    expected = (expected + ((counts + PRIOR) / counts).log()).log_softmax(dim=1)
    torch.testing.assert_close(found(readout, x).log_softmax(dim=1), expected, rtol=1e-6, atol=1e-6)


def weighted(kind: str, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Scores of least squares without a penalty, or of the discriminant by a pseudoinverse."""
    x, onehot, share = x[:, :-1], torch.nn.functional.one_hot(labels).double(), weights.double() / weights.sum()
    mean = share @ x
    if kind == "ridge":
        target = 2 * onehot - 1
        rows = share.sqrt()[:, None]
        return (x - mean) @ torch.linalg.lstsq((x - mean) * rows, (target - share @ target) * rows).solution + (
            share @ target
        )
    prior = share @ onehot
    means = onehot.T @ (share[:, None] * x) / prior[:, None]
    within = x - means[labels]
    matrix = torch.linalg.pinv(within.T @ (share[:, None] * within)) @ (means - mean).T
    counts = weights.double() @ onehot + PRIOR
    return (x - mean) @ matrix - 0.5 * ((means - mean).T * matrix).sum(dim=0) + (counts / counts.sum()).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "forgetting"), [(1, 1.0), (1, 0.99), (5, 1.0), (5, 0.99), (64, 0.999)])
def test_between_factorisations_records_count_at_once(
    kind: Literal["ridge", "discriminant"], batch: int, forgetting: float
) -> None:
    """With a penalty too small to matter: that it is lazy shows nowhere. Weights of records, some of them 0, and
    records without labels among the others."""
    x, labels = records(400, 30, 3)
    weights = torch.rand(400, generator=seeded("weights"), dtype=torch.float64) * (torch.arange(400) % 5 > 0)
    readout = OnlineReadout(30, ReadoutConfig(kind=kind, penalty=1e-10, initial_penalty=0, forgetting=forgetting))
    waited = 0
    for start in range(0, 400, batch):
        some = slice(start, start + batch)
        given = torch.where(torch.arange(400)[some] % 7 == 3, UNLABELLED, labels[some])
        readout.learn(x[some], given, weights[some])
        waited += len(readout.state()["pending"]) > 0
        if start < 200 or start // batch % 10:
            continue
        seen = torch.arange(min(start + batch, 400))
        seen = seen[(seen % 7 != 3) & (weights[seen] > 0)]
        ages = torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
        expected = weighted(kind, x[seen], labels[seen], weights[seen] * forgetting**ages)
        torch.testing.assert_close(found(readout, x[seen]), expected, rtol=1e-5, atol=1e-5)
    assert waited > 0 or batch == 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_at_most_a_little_behind(kind: Literal["ridge", "discriminant"]) -> None:
    """Of a readout that has learnt one by one, against one that has learnt the same at once."""
    x, labels = records(333, 40, 3)
    config = ReadoutConfig(kind=kind)
    slow, fast = learnt(x, labels, 1, config), learnt(x, labels, 333, config)
    assert len(slow.state()["pending"]) > 0
    torch.testing.assert_close(found(slow, x), found(fast, x), rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reservoir", [0, 20])
def test_a_restored_readout_goes_on_with_the_same_bits(
    kind: Literal["ridge", "discriminant"], reservoir: int, tmp_path: Path
) -> None:
    x, labels = records(300, 24, 5)
    config = ReadoutConfig(kind=kind, forgetting=0.995, reservoir=reservoir)
    whole, second = OnlineReadout(24, config), OnlineReadout(24, config)
    for start in range(0, 300, 3):
        if start == 150:
            save_state(whole.state(), tmp_path / "state")
            second.restore(load_state(tmp_path / "state"))
        for each in (whole, second) if start >= 150 else (whole,):
            each.learn(x[start : start + 3], labels[start : start + 3], inputs=x[start : start + 3])
        if start >= 150:
            assert torch.equal(found(whole, x), found(second, x))
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    assert whole.nbytes <= 8 * (2 * 24**2 + 256 * 24 + 5 * 24 + 29) + reservoir * (24 * 8 + 24) + 8


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_no_scores_before_two_classes(kind: Literal["ridge", "discriminant"]) -> None:
    readout = OnlineReadout(2, ReadoutConfig(kind=kind))
    assert readout.scores(torch.zeros(1, 2)) is None
    readout.learn(torch.ones(3, 2), torch.tensor([UNLABELLED, 0, 0]))
    assert readout.scores(torch.zeros(1, 2)) is None
    readout.learn(torch.zeros(1, 2), torch.tensor([3]))  # 1 and 2 have no records
    scores = found(readout, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert scores.isfinite().all()
    assert scores.argmax(dim=1).tolist() == [0, 3]


@pytest.mark.parametrize("forgetting", [1.0, 0.99])
def test_recomputed_sums_are_those_of_the_reservoir(forgetting: float) -> None:
    """Of a reservoir that holds all records, with features that have moved: a readout that has always seen the new
    ones, with the same weights."""
    x, labels = records(300, 10, 3)
    weights = torch.rand(300, generator=seeded("weights"))
    readout = OnlineReadout(10, ReadoutConfig(reservoir=300, forgetting=forgetting))
    moved = OnlineReadout(10, ReadoutConfig(forgetting=forgetting))
    for some in torch.split(torch.arange(300), 20):
        readout.learn(x[some], labels[some], weights[some], inputs=x[some])
    readout.recompute(torch.square)
    moved.learn(x.square(), labels, weights)
    torch.testing.assert_close(found(readout, x.square()), found(moved, x.square()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recomputed_late_in_a_stream_does_not_vanish(kind: Literal["ridge", "discriminant"]) -> None:
    """γ to the power of every age is 0 in float64 where none of the last records is held."""
    x, labels = records(60, 5, 3)
    readout, moved = (OnlineReadout(5, ReadoutConfig(kind=kind, forgetting=0.9, reservoir=60)) for _ in range(2))
    for each in (readout, moved):
        each.learn(x, labels, inputs=x)
    readout.reservoir.seen[0] += 10**6  # as after so many others, none of which is held
    for each in (readout, moved):
        each.recompute(torch.square)
    assert torch.equal(found(readout, x.square()), found(moved, x.square()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgetting", [0.5, 0.999])
def test_a_long_stream_is_its_last_records(kind: Literal["ridge", "discriminant"], forgetting: float) -> None:
    """Of 10⁵ records only the last ones have a weight that float64 tells from 0."""
    generator = seeded("long")
    x, labels = torch.randn(100_000, 2, generator=generator), torch.randint(3, (100_000,), generator=generator)
    x[:, 0] += labels
    config = ReadoutConfig(kind=kind, forgetting=forgetting)
    whole, end = learnt(x, labels, 2000, config), learnt(x[-50_000:], labels[-50_000:], 2000, config)
    torch.testing.assert_close(found(whole, x[:9]), found(end, x[:9]))


def test_bad_input_is_named_and_changes_nothing() -> None:
    readout, x = OnlineReadout(3, ReadoutConfig(reservoir=5, forgetting=0.9)), torch.rand(2, 3)
    labels = torch.tensor([0, 1])
    readout.learn(x, labels, inputs=x)
    before = readout.state()
    with pytest.raises(ValueError, match=r"features: expected \[2, 3\], got \[2, 4\]"):
        readout.learn(torch.zeros(2, 4), labels, inputs=x)
    with pytest.raises(ValueError, match=r"inputs: expected those of the features, .*, for the reservoir, got None"):
        readout.learn(x, labels)
    with pytest.raises(ValueError, match="features: expected finite values, got others"):
        readout.learn(x.log().fill_(torch.nan), labels, inputs=x)
    with pytest.raises(ValueError, match="labels: expected classes from 0 or -1, got -2"):
        readout.learn(x, labels - 2, inputs=x)
    with pytest.raises(ValueError, match=r"inputs: expected those of the features, \[2, …\]"):
        readout.learn(x, labels, inputs=x[:1])
    with pytest.raises(ValueError, match=r"weights: expected \[2\], one per record, got \[3\]"):
        readout.learn(x, labels, torch.ones(3), inputs=x)
    for weight in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match=f"weights: expected finite numbers from 0 on, got {weight:g}"):
            readout.learn(x, labels, torch.tensor([1.0, weight]), inputs=x)
    with pytest.raises(ValueError, match="scatter: expected 4 features, got 3 in the state"):
        OnlineReadout(4, ReadoutConfig()).restore(before)
    with pytest.raises(ValueError, match="features: expected finite values, got others"):
        readout.recompute(lambda inputs: inputs / 0)
    for name, value in before.items():
        assert torch.equal(value, readout.state()[name]), name
