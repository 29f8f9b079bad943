"""The images of an evaluation: who learns from what, and what is done to them."""

from __future__ import annotations

import pytest
import torch

from jobs.evaluation.material import Material, resized, with_outliers
from simmatch.config import ConfigError
from simmatch.data.sources import Dataset
from simmatch.model import InputConfig


def test_held_out_images_are_the_last_and_nobody_learns_from_them(digits: Dataset) -> None:
    material = Material.of(digits, 100)
    count = len(digits.train_images)
    assert (len(material.train), len(material.held_out), len(material.test)) == (
        count - 100,
        100,
        len(digits.test_images),
    )
    assert torch.equal(material.held_out.labels, digits.train_labels[-100:])
    torch.testing.assert_close(material.train.images[-1], digits.train_images[-101].float(), rtol=0, atol=1e-6)
    assert int(material.labelled(None, 0).max()) == count - 101


def test_a_budget_is_balanced_and_contained_in_the_next(digits: Dataset) -> None:
    material = Material.of(digits, 100)
    few, more = material.labelled(5, 1), material.labelled(20, 1)
    assert torch.bincount(material.train.labels[few]).tolist() == [5] * 10
    assert set(few.tolist()) < set(more.tolist())
    assert set(few.tolist()) != set(material.labelled(5, 2).tolist())


def test_more_held_out_than_there_are_is_refused(digits: Dataset) -> None:
    with pytest.raises(ConfigError, match="held_out: expected less than the 1437 training images, got 2000"):
        Material.of(digits, 2000)


def test_outliers_are_so_many_and_the_rest_is_untouched() -> None:
    images = torch.full((200, 1, 4, 4), 0.5)
    altered = with_outliers(images, 0.05, seed=3)
    differing = (altered != images).flatten(1).any(dim=1)
    assert int(differing.sum()) == 10
    assert torch.equal(altered, with_outliers(images, 0.05, seed=3))
    assert not torch.equal(differing, (with_outliers(images, 0.05, seed=4) != images).flatten(1).any(dim=1))
    assert 0.4 < float(altered[differing].mean()) < 0.6
    assert bool((images == 0.5).all())  # a copy was altered


def test_images_of_another_data_set_take_its_size_and_channels() -> None:
    grey = InputConfig(in_channels=1, height=28, width=28, num_classes=10)
    colour = InputConfig(in_channels=3, height=8, width=8, num_classes=10)
    ramp = torch.linspace(0, 1, 8).expand(2, 1, 8, 8)
    larger = resized(ramp, grey)
    assert larger.shape == (2, 1, 28, 28)
    assert bool((larger.diff(dim=3) >= -1e-6).all())  # still a ramp
    assert float(larger.mean()) == pytest.approx(0.5, abs=1e-3)
    coloured = resized(ramp, colour)
    assert torch.equal(coloured[:, 0], coloured[:, 2])
    assert torch.equal(coloured[:, :1], ramp)
    assert resized(coloured, grey).shape == (2, 1, 28, 28)
