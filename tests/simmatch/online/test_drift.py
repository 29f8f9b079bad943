"""Drift detectors on signals of a stream.

Oracles: Page–Hinkley and the ranks written out slowly; river's ADWIN fed directly; a monitor that was never stopped;
exact intervals of simulated rates; the correlation time of an autoregressive process in closed form.
"""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from river.drift import ADWIN
from scipy.signal import lfilter
from torch import Tensor

from simmatch.config import ConfigError, parse
from simmatch.online.dependence import WINDOW, correlation_time
from simmatch.online.drift import UNIFORM_DEVIATION, Drift, DriftConfig, DriftMonitor

PAGE_HINKLEY = DriftConfig(begin=0, detectors=("page_hinkley",))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fed(monitor: DriftMonitor, values: dict[str, Tensor], batch: int, first: int = 0) -> list[Drift]:
    """All drifts of a stream of batches; what follows a drift begins with the next batch."""
    found = []
    for start in range(0, len(next(iter(values.values()))), batch):
        part = {name: signal[start : start + batch] for name, signal in values.items()}
        found += monitor.add(part, first + start)
    return found


def autoregressive(coefficient: float, count: int, seed: int) -> Tensor:
    """A stationary process with variance 1 and correlation time (1 + coefficient) / (1 - coefficient)."""
    noise = torch.randn(count, generator=drawn(seed)).double() * math.sqrt(1 - coefficient**2)
    noise[0] /= math.sqrt(1 - coefficient**2)
    return torch.from_numpy(lfilter([1.0], [1.0, -coefficient], noise.numpy()))


def ranks(reference: list[float], values: list[float]) -> list[float]:
    ordered = sorted(reference)
    return [
        (bisect.bisect_left(ordered, each) + bisect.bisect_right(ordered, each)) / (2 * len(ordered)) for each in values
    ]


def page_hinkley(shares: list[float], tolerance: float, threshold: float) -> int | None:
    """Place of the first alarm of a rise: the sum of deviations above its least value so far."""
    total = least = mean = 0.0
    for place, share in enumerate(shares):
        mean += (share - mean) / (place + 1)
        total += share - mean - tolerance
        least = total if place == 0 else min(least, total)
        if place >= 29 and total - least > threshold:
            return place
    return None


def test_page_hinkley_on_ranks_as_written_out() -> None:
    config = PAGE_HINKLEY
    signal = torch.randn(1200, generator=drawn(0)).double().exp()
    signal[700:] *= 2.0
    values = signal.tolist()
    reference = values[: config.reference]
    expected = page_hinkley(ranks(reference, values), config.tolerance, config.threshold)
    assert expected is not None
    assert expected > 700
    (drift,) = fed(DriftMonitor(config), {"novelty": signal}, batch=1200)
    assert (drift.signal, drift.number, drift.detector) == ("novelty", expected, "page_hinkley")
    assert drift.before == pytest.approx(sum(values[: expected - 49]) / (expected - 49))
    assert drift.after == pytest.approx(sum(values[expected - 49 : expected + 1]) / 50)


def test_adwin_on_errors_as_river_finds_them() -> None:
    config = DriftConfig(begin=0, detectors=("adwin",), keep=5000)
    errors = (torch.rand(3000, generator=drawn(1)) < 0.1).double()
    errors[2000:] = (torch.rand(1000, generator=drawn(2)) < 0.5).double()
    values = errors.tolist()
    scale = min(1.0, UNIFORM_DEVIATION / float(errors[: config.reference].std(correction=0)))
    detector, expected = ADWIN(delta=config.adwin_delta, clock=config.adwin_clock), None
    for place, value in enumerate(values):
        detector.update(value * scale)
        if detector.drift_detected:
            expected = place
            break
    assert expected is not None
    (drift,) = fed(DriftMonitor(config), {"error": errors}, batch=3000)
    assert drift.number == expected
    assert drift.before < 0.2 < 0.3 < drift.after


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9, 0.98])
def test_correlation_time_is_that_of_an_autoregressive_process(coefficient: float) -> None:
    """The estimate's standard deviation, relative, is √(2 (2 · 10 + 1) τ / n), Sokal's equation 3.19: five of them."""
    count, expected = 200_000, (1 + coefficient) / (1 - coefficient)
    found = correlation_time(autoregressive(coefficient, count, seed=11).numpy())
    assert found == pytest.approx(expected, rel=5 * math.sqrt(2 * (2 * WINDOW + 1) * expected / count) + 0.01)


def test_correlation_time_as_written_out() -> None:
    values = autoregressive(0.7, 400, seed=12).numpy()
    deviations = values - np.polynomial.Polynomial.fit(range(400), values, deg=1)(np.arange(400.0))
    time, lag = 1.0, 0
    while lag < WINDOW * time:
        lag += 1
        time += 2 * float(deviations[:-lag] @ deviations[lag:]) / float(deviations @ deviations)
    assert correlation_time(values) == pytest.approx(time, rel=1e-9)


@pytest.mark.parametrize("values", [[0.0] * 300, [0.1] * 300, [0.0, 1.0] * 150, [0.1 * i for i in range(300)]])
def test_correlation_time_is_at_least_one(values: list[float]) -> None:
    assert correlation_time(np.array(values)) == 1.0


def test_adwin_on_means_of_blocks_as_river_finds_them() -> None:
    config = DriftConfig(begin=0, detectors=("adwin",))
    signal = autoregressive(0.8, 20_000, seed=13)
    signal[9_000:] += 2.0
    values, block, taken = signal.numpy(), 1, 0
    while taken < config.reference * block:
        taken = config.reference * block
        block = math.ceil(correlation_time(np.array(ranks(list(values[:taken]), list(values[:taken])))))
    reference = list(values[:taken])
    assert 5 <= block <= 15
    assert config.keep * 2 * block > 9_000
    detector, expected = ADWIN(delta=config.adwin_delta, clock=config.adwin_clock), None
    for end in range(block, len(values) + 1, block):
        detector.update(sum(ranks(reference, list(values[end - block : end]))) / block)
        if detector.drift_detected and end > taken:
            expected = end - 1
            break
    assert expected is not None
    (drift,) = fed(DriftMonitor(config), {"novelty": signal}, batch=20_000)
    assert drift.number == expected
    assert drift.after == pytest.approx(float(values[expected + 1 - 50 * block : expected + 1].mean()))


@pytest.mark.parametrize("batch", [1, 7, 64, 400])
def test_alarms_do_not_depend_on_the_size_of_batches(batch: int) -> None:
    signal = torch.randn(3500, generator=drawn(3))
    signal[3000:] += 1.0
    found = fed(DriftMonitor(DriftConfig(begin=0)), {"objective": signal}, batch)
    assert found[0] == fed(DriftMonitor(DriftConfig(begin=0)), {"objective": signal}, 3500)[0]


def test_what_is_left_out_is_as_if_it_were_not_there() -> None:
    signal, gaps = torch.randn(2000, generator=drawn(4)).double(), torch.rand(2000, generator=drawn(5)) < 0.5
    signal[1200:] += 2.0
    (whole,) = fed(DriftMonitor(DriftConfig(begin=0)), {"novelty": signal[~gaps]}, 2000)
    (gappy,) = fed(DriftMonitor(DriftConfig(begin=0)), {"novelty": signal.masked_fill(gaps, math.nan)}, 2000)
    assert gappy.number == int((~gaps).nonzero()[whole.number])
    assert (gappy.before, gappy.after) == (whole.before, whole.after)


@pytest.mark.parametrize("stop", [50, 299, 300, 1700, 2000, 2050, 4321])
def test_a_restored_monitor_goes_on_with_the_same_bits(stop: int) -> None:
    config, generator = DriftConfig(begin=100), drawn(6)
    signals = {name: torch.randn(6000, generator=generator) for name in ("novelty", "objective")}
    signals["error"] = (torch.rand(6000, generator=generator) < 0.2).double()
    signals["novelty"][5000:] += 0.7
    monitor, other = DriftMonitor(config), DriftMonitor(config)
    before = {name: signal[:stop] for name, signal in signals.items()}
    after = {name: signal[stop:] for name, signal in signals.items()}
    assert fed(monitor, before, 50) == []
    other.restore(monitor.state())
    found, again = fed(monitor, after, 50, stop), fed(other, after, 50, stop)
    assert found == again
    assert [drift.signal for drift in found] == ["novelty"]
    state, restored = monitor.state(), other.state()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[key], restored[key]) for key in state)


@pytest.mark.parametrize("stop", [299, 301, 3001, 4003, 5555, 29_999])
def test_a_restored_monitor_goes_on_in_the_midst_of_a_block(stop: int) -> None:
    config = DriftConfig(begin=0, reference=100, keep=200)
    signal = autoregressive(0.9, 30_000, seed=14)
    signal[15_000:] += 3.0
    monitor, other = DriftMonitor(config), DriftMonitor(config)
    first = fed(monitor, {"novelty": signal[:stop]}, 50)
    other.restore(monitor.state())
    assert fed(monitor, {"novelty": signal[stop:]}, 50, stop) == fed(other, {"novelty": signal[stop:]}, 50, stop)
    state, restored = monitor.state(), other.state()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[key], restored[key]) for key in state)
    assert int(state["novelty.block"]) > 1
    assert bool(first) == (stop > 15_000)


def test_states_of_earlier_versions_have_no_blocks() -> None:
    signal = torch.randn(4000, generator=drawn(15))
    signal[3000:] += 1.0
    monitor, other = DriftMonitor(DriftConfig(begin=0)), DriftMonitor(DriftConfig(begin=0))
    fed(monitor, {"novelty": signal[:1500]}, 50)
    state = monitor.state()
    assert int(state.pop("novelty.block")) == 1
    other.restore(state)
    assert fed(other, {"novelty": signal[1500:]}, 50) == fed(monitor, {"novelty": signal[1500:]}, 50)


def test_memory_is_bounded() -> None:
    config = DriftConfig(begin=0, reference=50, keep=100, block=3)
    monitor = DriftMonitor(config)
    for start in range(0, 5000, 50):
        monitor.add({name: torch.rand(50, generator=drawn(start)) for name in config.signals}, start)
        state = monitor.state()
        assert all(len(tensor) <= 2 * config.keep * config.block for tensor in state.values() if tensor.ndim)


def test_only_a_rise_of_error_or_novelty_is_an_alarm() -> None:
    signal = torch.randn(4000, generator=drawn(7))
    signal[2000:] -= 2.0
    config = DriftConfig(begin=0, signals=("novelty", "active"))
    assert fed(DriftMonitor(config), {"novelty": signal}, 50) == []
    assert fed(DriftMonitor(config), {"active": signal}, 50)[0].number in range(2000, 2100)
    signal[3500:] += 2.0  # back to where it began, which is a rise again
    assert fed(DriftMonitor(config), {"novelty": signal}, 50)[0].number in range(3500, 3600)


def test_after_a_drift_all_signals_start_anew() -> None:
    both = torch.randn(4000, generator=drawn(8))
    both[2000:] += 1.5
    found = fed(DriftMonitor(DriftConfig(begin=0)), {"novelty": both, "objective": both + 1}, 25)
    assert [drift.signal for drift in found] == ["novelty", "objective"]
    assert found[0].number == found[1].number


def test_the_beginning_is_not_watched() -> None:
    signal = torch.randn(1000, generator=drawn(9))
    signal[500:] += 3.0
    assert fed(DriftMonitor(DriftConfig(begin=1000)), {"novelty": signal}, 50) == []


def test_labels_that_come_late_do_not_shorten_the_beginning() -> None:
    monitor = DriftMonitor(DriftConfig(begin=100))
    for start in range(0, 100, 50):
        monitor.add({"error": torch.zeros(90), "novelty": torch.rand(50, generator=drawn(start))}, start)
    assert int(monitor.state()["records"]) == 100
    assert "novelty.values" not in monitor.state()


def test_rates_on_stationary_signals_are_as_stated() -> None:
    """At most one alarm in 20,000 records: 100,000 with 17 alarms or more are improbable (1e-5) then; here 0 or 1."""
    generator, alarms, monitor = drawn(10), 0, DriftMonitor(DriftConfig(begin=0))
    for start in range(0, 100_000, 500):
        values = {"novelty": torch.randn(500, generator=generator).exp()}
        values["error"] = (torch.rand(500, generator=generator) < 0.1).double()
        alarms += bool(monitor.add(values, start))
    assert alarms <= 1


def test_dependent_signals_seldom_raise_an_alarm() -> None:
    """At one alarm in 20,000, five in 20,000 and more are improbable (0.004)."""
    signals = {name: autoregressive(0.9, 20_000, seed) for seed, name in enumerate(("novelty", "objective"))}
    signals["error"] = (autoregressive(0.9, 20_000, seed=2) > 1.28).double()
    assert len(fed(DriftMonitor(DriftConfig(begin=0, block=1)), signals, 500)) >= 10
    assert len(fed(DriftMonitor(DriftConfig(begin=0)), signals, 500)) <= 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": 2000}, "expected at most keep, 1000, got 2000"),
        ({"detectors": ["cusum"]}, "detectors"),
        ({"threshold": 0.0}, "threshold: expected greater than 0, got 0.0"),
    ],
)
def test_bad_keys_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DriftConfig, values)
