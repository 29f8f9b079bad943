"""Networks trained by backpropagation as rows of an evaluation."""

from __future__ import annotations

import pytest
import torch

from jobs.evaluation import networks
from jobs.evaluation.backprop import TrainSettings
from jobs.evaluation.config import MeasurementConfig
from jobs.evaluation.material import Material
from jobs.evaluation.networks import NETWORKS
from simmatch.data.sources import Dataset

PLAN = MeasurementConfig(
    budgets=(5,), tuning_images=100, corrupted_images=20, outlier_shares=(0.5,), outlier_images=100
)
USELESS, USEFUL = TrainSettings(lr=1e-7, least_steps=20, epochs=1), TrainSettings(lr=3e-3, least_steps=80, epochs=3)


@pytest.fixture
def material(digits: Dataset) -> Material:
    return Material.of(digits, 150)


@pytest.fixture(autouse=True)
def two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "candidates", lambda per_class: (USELESS, USEFUL))
    monkeypatch.setattr(networks, "TUNING_SHARE", 1.0)


def test_settings_are_chosen_for_every_budget_by_held_out_images(material: Material) -> None:
    assert NETWORKS["lenet"].tune(material, PLAN, seed=0) == {"5": 1, "all": 1}


def test_of_equals_the_first_is_chosen(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "compare", lambda *_: [0.5, 0.7, 0.7, 0.6])
    assert NETWORKS["lenet"].tune(material, PLAN, seed=0) == {"5": 1, "all": 1}


def test_a_result_for_every_budget(material: Material) -> None:
    network, chosen = NETWORKS["lenet"], {"5": 1, "all": 1}
    result, net = network.evaluate(chosen, material, PLAN, seed=0)
    assert result.accuracy["all"] > result.accuracy["5"] > 0.3  # ten classes
    assert result.accuracy["all"] > 0.8
    assert result.parameters_trained == sum(values.numel() for values in net.parameters())
    assert result.neighbours is not None
    assert result.neighbours > 0.8
    again, _ = network.evaluate(chosen, material, PLAN, seed=0)
    assert again.accuracy == result.accuracy
    under = networks.corrupted_accuracy(net, material, 100)
    assert len(under) == 16
    assert sum(under.values()) / 16 < under["clean"]
    read = networks.transferred(net, material, material.source, (5, 10_000, None), seed=0)
    assert set(read) == {"5", "all"}  # no class has ten thousand
    assert read["all"] > 0.8  # its own images, read by ridge


def test_noise_in_half_of_the_images_costs_accuracy(material: Material) -> None:
    plan = MeasurementConfig(budgets=(), corrupted_images=0, outlier_shares=(0.9,), outlier_images=300)
    found = NETWORKS["lenet"].with_noise({"all": 1}, material, plan, seed=0)
    assert set(found) == {"0", "0.9"}
    assert found["0"] > found["0.9"] + 0.2


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_takes_the_images_of_any_set(name: str, material: Material) -> None:
    net = NETWORKS[name].make(material.source, 0)
    assert net(material.test.images[:3]).shape == (3, 10)
    assert torch.equal(net(material.test.images[:3]), NETWORKS[name].make(material.source, 0)(material.test.images[:3]))
