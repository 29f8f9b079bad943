"""Champion and challengers: limits that hold at all times, against a slow formula and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp

from simmatch.online.comparison import FRACTIONS, Comparison, ComparisonConfig, lower_limit


def capital(differences: np.ndarray, mean: float) -> np.ndarray:
    """log K_t(m) for t = 1 … of differences [streams, t], one record after the other."""
    logs = [np.log1p(bet * (differences - mean)).cumsum(axis=-1) for bet in FRACTIONS]
    return np.asarray(logsumexp(logs, axis=0) - math.log(len(FRACTIONS)))


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.3, 0.05), (0.0, 0.4), (0.6, 0.4)])
def test_limits_are_the_roots_of_the_capital(rates: tuple[float, float]) -> None:
    """Oracle: the product over records, and scipy's root."""
    more, less = rates
    differences = np.random.default_rng(1).choice([1.0, 0.0, -1.0], size=500, p=[more, 1 - more - less, less])
    counts = [int((differences == value).sum()) for value in (1, 0, -1)]

    def above(mean: float, signed: np.ndarray) -> float:
        return float(capital(signed, mean)[-1] - math.log(20))

    low = brentq(above, -0.999, 0.999, args=(differences,), xtol=1e-12)
    high = -brentq(above, -0.999, 0.999, args=(-differences,), xtol=1e-12)
    assert lower_limit(*counts, error=0.05) == pytest.approx(low, abs=1e-9)
    assert -lower_limit(*counts[::-1], error=0.05) == pytest.approx(high, abs=1e-9)
    assert low < differences.mean() < high


def means(kind: str, discordant: float, length: int) -> np.ndarray:
    """μᵢ: never a difference; one that is made up for later; one that comes and goes."""
    index = np.arange(length)
    sign = {"none": np.zeros(length), "late": np.where(index < length // 2, -1.0, 1.0), "waves": np.sin(index / 30)}
    return 0.5 * discordant * sign[kind]


def drawn(mean: np.ndarray, discordant: float, streams: int, seed: int) -> np.ndarray:
    """Differences [streams, t] with these means, of which a share is not 0."""
    uniform = np.random.default_rng(seed).random((streams, len(mean)))
    return np.where(uniform < (discordant + mean) / 2, 1.0, np.where(uniform < discordant, -1.0, 0.0))


@pytest.mark.parametrize("kind", ["none", "late", "waves"])
@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.5])
def test_limits_hold_at_all_times(kind: str, discordant: float) -> None:
    """Of 400 streams, looked at after each of 2,000 records: the limit of error 0.1 is above the mean of μ₁ … μ_t at
    some t in at most 0.1, give or take 4 deviations of 0.015. It is above m where K_t(m) ≥ 10."""
    mean = means(kind, discordant, 2000)
    differences = drawn(mean, discordant, 400, seed=2)
    running = mean.cumsum() / np.arange(1, 2001)
    more, same, less = ((differences == value).cumsum(axis=1) for value in (1, 0, -1))
    total = np.zeros_like(differences)
    for bet in FRACTIONS:
        logs = [np.log1p(bet * (value - running)) for value in (1, 0, -1)]
        total += np.exp(more * logs[0] + same * logs[1] + less * logs[2]) / len(FRACTIONS)
    assert (total >= 10).any(axis=1).mean() <= 0.1 + 4 * 0.015


def test_false_switches_are_rare_over_a_whole_stream() -> None:
    """60 streams of 400 records, three challengers as good as the champion, comparisons that begin anew every 100:
    α = 0.2 bounds the share of streams with a switch, looked at after every record."""
    names = ["a", "b", "c", "d"]
    config = ComparisonConfig(alpha=0.2, min_records=0, horizon=100)
    right = torch.from_numpy(np.random.default_rng(3).random((60, 400, 4)) < 0.8)
    switched = 0
    for stream in right:
        comparison = Comparison(names, "a", config)
        switched += any(comparison.add(dict(zip(names, record[:, None], strict=True))) for record in stream)
    assert switched <= 12


def test_a_difference_of_five_points_is_found_within_some_hundred_records() -> None:
    """Candidates that disagree on a tenth of the records; the figures of the README are 360 and, 9 of 10, 740."""
    generator, taken = np.random.default_rng(6), []
    for _ in range(60):
        comparison, switch = Comparison(["a", "b"], "a", ComparisonConfig()), None
        while switch is None:
            uniform = torch.from_numpy(generator.random(8))
            switch = comparison.add({"a": uniform >= 0.075, "b": (uniform < 0.075) | (uniform >= 0.1)})
        taken.append(switch.records)
    assert 250 < np.median(taken) < 450
    assert np.quantile(taken, 0.9) < 1000


def test_a_switch_can_be_reversed() -> None:
    """The better of two answers, from some records after it has become better."""
    generator = np.random.default_rng(4)
    comparison = Comparison(["a", "b"], "a", ComparisonConfig(horizon=1000))
    champions, switches = [], []
    for step in range(150):
        better = ("b", "a", "b")[step // 50]
        right = {name: torch.from_numpy(generator.random(32) < (0.9 if name == better else 0.8)) for name in "ab"}
        switch = comparison.add(right)
        champions.append(comparison.champion)
        if switch is not None:
            switches.append(switch)
            assert 0 < switch.interval[0] < 0.1 < switch.interval[1]
            assert switch.records >= 100
    assert [switch.after for switch in switches] == ["b", "a", "b"]
    assert [champions[number] for number in (49, 99, 149)] == ["b", "a", "b"]


def test_errors_add_up_to_alpha() -> None:
    comparison, spent = Comparison(["a", "b", "c"], "a", ComparisonConfig(alpha=0.1, horizon=1)), 0.0
    for _ in range(2000):
        spent += 2 * comparison.error
        comparison.add({name: torch.ones(1) for name in "abc"})
    assert 0.0999 < spent < 0.1


def test_a_restored_comparison_goes_on_as_before() -> None:
    generator = np.random.default_rng(5)
    config = ComparisonConfig(min_records=10, horizon=700)
    first, second = Comparison(["a", "b"], "b", config), Comparison(["a", "b"], "b", config)
    for step in range(100):
        right = {name: torch.from_numpy(generator.random(16) < share) for name, share in (("a", 0.9), ("b", 0.7))}
        if step == 40:
            second.restore(first.state())
        for each in (first, second) if step >= 40 else (first,):
            each.add(right)
    assert first.state().keys() == second.state().keys()
    for name, value in first.state().items():
        assert torch.equal(value, second.state()[name])
    assert first.interval(first.challengers[0]) == second.interval(first.challengers[0])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="champion: expected one of a, b, all different, got 'c'"):
        Comparison(["a", "b"], "c", ComparisonConfig())
    comparison = Comparison(["a", "b"], "a", ComparisonConfig())
    with pytest.raises(ValueError, match=r"right: expected as many records of each of a, b, got a \[3\], b \[2\]"):
        comparison.add({"a": torch.ones(3), "b": torch.ones(2)})
