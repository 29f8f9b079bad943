"""What is measured of drift and novelty: false alarms, areas, and a model that is watched.

Oracles: scikit-learn's area under the curve, a model that was never stopped.
"""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor

from jobs.benchmarks.stream.alarms import simulated
from jobs.benchmarks.stream.novelty import Without, area
from jobs.benchmarks.stream.stationary import RUN, Autoregressive, Runs, Switching
from jobs.benchmarks.stream.watched import Watched, Watching
from simmatch.online.dependence import correlation_time
from simmatch.online.drift import DriftConfig

WATCHING = Watching(drift=DriftConfig(begin=500))


def tones(count: int, generator: Generator, periods: tuple[float, ...] = (5.0, 9.0)) -> tuple[Tensor, Tensor]:
    """Windows of noisy tones of any phase; the class is the period."""
    labels = torch.randint(len(periods), (count,), generator=generator)
    phase = torch.rand(count, 1, generator=generator) * 6.28
    x = torch.sin(phase + 6.28 * torch.arange(256.0) / torch.tensor(periods)[labels].unsqueeze(1))
    return (x + 0.5 * torch.randn(x.shape, generator=generator)).reshape(count, 1, 1, 256), labels


def test_area_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    usual, novel = (torch.randint(9, (n,), generator=generator) for n in (50, 30))
    expected = roc_auc_score([0] * 50 + [1] * 30, torch.cat([usual, novel]).numpy())
    assert area(usual, novel) == pytest.approx(expected, rel=1e-9)


def test_simulated_errors_change_where_they_are_said_to_rest() -> None:
    """With a detector that tolerates nothing there are alarms; with the defaults there is none."""
    nervous = DriftConfig(begin=0, detectors=("page_hinkley",), tolerance=1e-6, threshold=2.0)
    assert simulated(9_000, 0, nervous, Autoregressive(0.0)).alarms > 10
    assert simulated(9_000, 0, DriftConfig(begin=0), Autoregressive(0.0)).alarms == 0


def test_runs_have_their_mean_length_and_go_on_from_call_to_call() -> None:
    generator = torch.Generator().manual_seed(5)
    runs = Runs()
    classes = torch.cat([runs(count, generator) for count in [7, 50, 43] * 2000])
    ends = (classes.diff() != 0).sum()
    assert len(classes) / int(ends) == pytest.approx(RUN, rel=5 / ends.sqrt().item())  # geometric: deviation = mean
    assert torch.bincount(classes).numpy() == pytest.approx(len(classes) / 9, rel=0.15)
    turns = Runs(turns=True)
    assert torch.cat([turns(30, generator) for _ in range(30)]).tolist() == [n // RUN % 9 for n in range(900)]


def test_signals_have_the_variance_and_the_dependence_that_they_are_said_to_have() -> None:
    generator = torch.Generator().manual_seed(6)
    values = Autoregressive(0.9)(100_000, 0.1, generator)
    assert float(values["novelty"].std()) == pytest.approx(1.0, abs=0.05)
    assert correlation_time(values["objective"].numpy()) == pytest.approx(19.0, rel=0.2)
    assert float(values["error"].mean()) == pytest.approx(0.1, abs=0.02)
    switching = Switching(1.0)(100_000, 0.1, generator)["novelty"].double()
    assert correlation_time(switching.numpy()) > 20


@pytest.mark.filterwarnings("ignore:the relative objective is above 1")  # 128 filters for two tones
def test_a_watched_model_goes_on_with_the_same_bits_and_finds_another_tone() -> None:
    warm = tones(1500, torch.Generator().manual_seed(1))
    model, other = (Watched("bearings", warm, 0, WATCHING) for _ in range(2))
    for _ in range(4):
        model.see(*tones(50, torch.Generator().manual_seed(2)))
    other.restore(model.state())
    seen = [
        [each.see(*tones(50, generator, (7.0, 7.0))) for _ in range(4)]
        for each, generator in ((one, torch.Generator().manual_seed(3)) for one in (model, other))
    ]
    assert all(torch.equal(one.scores, two.scores) for one, two in zip(*seen, strict=True))
    assert [one.drifts for one in seen[0]] != [[]] * 4
    assert bool(seen[0][0].novel.all())
    state, restored = model.state(), other.state()
    assert all(torch.equal(state[key], restored[key]) for key in state)


def test_a_held_out_class_is_left_out() -> None:
    records, generator = Without(tones, held_out=1), torch.Generator().manual_seed(4)
    assert records.usual(70, generator)[1].tolist() == [0] * 70
    assert records.novel(30, generator)[1].tolist() == [1] * 30
