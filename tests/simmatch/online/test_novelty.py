"""Scores, threshold and weights of novel records.

Oracles: distances and order statistics written out slowly; the rate that split conformal prediction promises; a
detector that was never stopped.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simmatch.config import ConfigError, parse
from simmatch.online.novelty import NoveltyConfig, NoveltyDetector


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def usual(count: int, generator: torch.Generator, features: int = 8) -> Tensor:
    return 1.0 + 0.3 * torch.rand(count, features, generator=generator)


def outliers(count: int, generator: torch.Generator, features: int = 8) -> Tensor:
    return 3.0 * torch.eye(features)[torch.randint(features, (count,), generator=generator)]


def learnt(config: NoveltyConfig, records: int, seed: int = 0) -> NoveltyDetector:
    detector, generator = NoveltyDetector(8, config), drawn(seed)
    for _ in range(records // 20):
        features = usual(20, generator)
        detector.learn(features, detector.score(features))
    return detector


def test_scores_as_written_out() -> None:
    generator = drawn(0)
    known, asked = usual(60, generator), usual(5, generator)
    detector = NoveltyDetector(8, NoveltyConfig())
    assert bool(detector.score(known).isnan().all())
    detector.learn(known, detector.score(known))

    def shortened(row: Tensor) -> list[float]:
        length = math.sqrt(math.sqrt(sum(value**2 for value in row.tolist())))
        return [value / length for value in row.tolist()]

    for row, score in zip(asked, detector.score(asked).tolist(), strict=True):
        expected = min(math.dist(shortened(row), shortened(other)) for other in known)
        assert score == pytest.approx(expected, rel=1e-3)


def test_scores_of_close_neighbours_keep_their_digits() -> None:
    """Of rows of length 80 that differ by 10⁻⁶ of it, alone and in a batch."""
    generator = drawn(1)
    known, asked = (10 + 1e-3 * torch.randn(50, 64, generator=generator) for _ in range(2))
    detector = NoveltyDetector(64, NoveltyConfig())
    detector.learn(known, detector.score(known))
    held = detector.state()["memory"].double()
    for row, score in zip(asked, detector.score(asked), strict=True):
        alone = detector.score(row[None])
        shortened = (row / row.norm().sqrt()).double()
        expected = float((shortened - held).norm(dim=1).min())
        assert float(score) == pytest.approx(expected, rel=0.01)
        assert float(alone) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("score", [0.0, 1e-9, 0.3, 5.0, 1e30])
def test_scores_that_are_all_equal_are_not_novel(score: float) -> None:
    """Of any size: the fence is not below them by rounding."""
    detector, scores = NoveltyDetector(3, NoveltyConfig()), torch.full((200,), score, dtype=torch.float64)
    detector.learn(torch.rand(200, 3, generator=drawn(0)), scores)
    assert detector.threshold == score
    assert detector.weights(scores).tolist() == [1.0] * 200


def test_features_that_are_not_finite_are_not_remembered() -> None:
    detector, features = learnt(NoveltyConfig(), 400), usual(20, drawn(1))
    before = detector.score(features)
    bad = features.clone()
    bad[3, 2], bad[4, 2] = torch.nan, torch.inf
    detector.learn(bad[3:5], detector.score(bad[3:5]))
    assert torch.equal(detector.score(features), before)


def test_a_state_of_another_size_is_refused() -> None:
    state = learnt(NoveltyConfig(memory=100), 400).state()
    with pytest.raises(ValueError, match=r"memory: expected at most 100 records of 9 features, got \[100, 8\]"):
        NoveltyDetector(9, NoveltyConfig(memory=100)).restore(state)
    with pytest.raises(ValueError, match="memory: expected at most 50 records"):
        NoveltyDetector(8, NoveltyConfig(memory=50)).restore(state)


@pytest.mark.parametrize(("records", "rate"), [(400, 0.01), (1600, 0.05), (2000, 0.002)])
def test_threshold_as_written_out(records: int, rate: float) -> None:
    config = NoveltyConfig(false_alarm_rate=rate)
    detector = learnt(config, records)
    last = detector.state()["scores"].tolist()
    assert len(last) == min(records - 20, config.calibration)  # the first batch has no scores
    logs = torch.tensor(last).double().log()
    low, high = torch.quantile(logs, 0.25), torch.quantile(logs, 0.75)
    inside = sorted(each for each in last if math.log(each) <= high + 3 * (high - low))
    place = math.ceil((1 - rate) * (len(inside) + 1))
    assert detector.threshold == inside[place - 1]


def test_no_threshold_before_there_are_scores_for_its_rate() -> None:
    assert learnt(NoveltyConfig(false_alarm_rate=0.01), 100).threshold is None  # 80 scores; 99 are needed
    assert learnt(NoveltyConfig(false_alarm_rate=0.01), 120).threshold is not None


def test_the_rate_of_false_alarms_is_as_stated() -> None:
    """20,000 exchangeable records, a = 0.05. Standard deviation of the rate: 0.0015 of drawing, about as much of the
    thresholds that calibrated it, which follow each other slowly; the memory moves by a few records a batch."""
    detector, generator, alarms = learnt(NoveltyConfig(false_alarm_rate=0.05, memory=200), 2000), drawn(1), 0
    for _ in range(400):
        features = usual(50, generator)
        scores = detector.score(features)
        alarms += int((scores > detector.threshold).sum())
        detector.learn(features, scores)
    assert alarms / 20_000 == pytest.approx(0.05, abs=0.008)


def test_outliers_are_found_weigh_nothing_and_are_forgotten() -> None:
    detector, generator = learnt(NoveltyConfig(), 2000), drawn(2)
    threshold = detector.threshold
    for _ in range(100):
        features = torch.cat([usual(19, generator), outliers(1, generator)])
        scores = detector.score(features)
        weights = detector.weights(scores)
        assert float(scores[-1]) > detector.threshold
        assert float(weights[-1]) == 0.0
        assert float(weights[:-1].mean()) > 0.9
        detector.learn(features, scores)
    assert detector.threshold == pytest.approx(threshold, rel=0.2)
    assert detector.far in range(100, 160)
    memory = detector.state()["memory"]
    assert float(memory.amin()) > 0.5  # an outlier has zeros


def test_weights_fall_with_the_score_and_stay_1_below_the_threshold() -> None:
    detector = learnt(NoveltyConfig(slope=2.0), 2000)
    threshold = detector.threshold
    assert threshold is not None
    scores = torch.tensor([0.0, 0.5, 1.0, 1.01, 1.2], dtype=torch.float64) * threshold
    expected = [1.0, 1.0, 1.0, 1.01**-2, 1.2**-2]
    assert detector.weights(scores).tolist() == pytest.approx(expected, rel=1e-6)
    assert detector.weights(torch.tensor([math.nan, 1e9]).double()).tolist() == [1.0, 0.0]


def test_what_most_records_are_is_the_new_normal() -> None:
    detector, generator = learnt(NoveltyConfig(), 2000), drawn(3)
    turned = torch.eye(8).roll(1, dims=0) * torch.linspace(0.0, 3.0, 8)
    shares = []
    for _ in range(100):
        features = usual(20, generator) @ turned
        scores = detector.score(features)
        shares.append(float((scores > detector.threshold).double().mean()))
        detector.learn(features, scores)
    assert shares[0] == 1.0
    assert max(shares[20:]) <= 0.2
    assert float(detector.weights(detector.score(usual(20, generator) @ turned)).mean()) > 0.9


@pytest.mark.parametrize("batches", [3, 30, 80])
def test_a_restored_detector_goes_on_with_the_same_bits(batches: int) -> None:
    config = NoveltyConfig(memory=300, calibration=200)
    detector, other = learnt(config, 20 * batches), NoveltyDetector(8, config)
    other.restore(detector.state())
    for each in (detector, other):
        generator = drawn(4)
        for _ in range(30):
            features = torch.cat([usual(19, generator), outliers(1, generator)])
            each.learn(features, each.score(features))
    state, restored = detector.state(), other.state()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[key], restored[key]) for key in state)
    assert detector.threshold == other.threshold


def test_memory_is_bounded_and_forgets_evenly() -> None:
    """A record is still there after n others with a probability of (1 − 1/m)^n."""
    config, size = NoveltyConfig(memory=500, false_alarm_rate=0.0001, calibration=50), 500
    detector = NoveltyDetector(1, config)
    for start in range(0, 2000, 10):
        features = torch.arange(start + 1.0, start + 11.0).unsqueeze(1)  # g = √f
        detector.learn(features, detector.score(features))
    held = detector.state()["memory"].square().flatten().round()
    assert len(held) == size
    assert detector.nbytes == 4 * size + 8 * 50
    for age in (0, 500, 1000):
        born = (held > 2000 - age - 500) & (held <= 2000 - age)
        expected = sum((1 - 1 / size) ** (age + n) for n in range(500))
        assert int(born.sum()) == pytest.approx(expected, abs=4 * math.sqrt(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"false_alarm_rate": 1.0}, "false_alarm_rate: expected less than 1, got 1.0"),
        ({"memory": 0}, "memory: expected greater than 0, got 0"),
    ],
)
def test_bad_keys_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(NoveltyConfig, values)
