"""Choices are made by held-out images: neither settings nor penalties know anything of test images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jobs.evaluation import features
from jobs.evaluation.config import MeasurementConfig
from jobs.evaluation.features import FeatureRow, FeatureView
from jobs.evaluation.learners import Pixels
from jobs.evaluation.material import Labelled, Material
from jobs.evaluation.networks import NETWORKS
from simmatch.data.sources import Dataset
from simmatch.seeding import seeded

PLAN = MeasurementConfig(budgets=(5,), tuning_images=200, corrupted_images=0, outlier_shares=(0.5,), outlier_images=100)


class Blurred(Pixels):
    """Pixels, of which the first settings keep the mean only."""

    def __init__(self, index: int) -> None:
        self.index = index

    def outputs(self, images: torch.Tensor) -> Any:
        blocks, scores = super().outputs(images)
        return [block.mean(dim=1, keepdim=True) if self.index == 0 else block for block in blocks], scores


ROW = FeatureRow("row", (FeatureView("row"),), ("useless", "useful"), lambda index, seed, _: Blurred(index))


@pytest.fixture
def material(digits: Dataset) -> Material:
    return Material.of(digits, 150)


def shuffled(part: Labelled) -> Labelled:
    order = torch.randperm(len(part), generator=seeded("shuffled"))
    return replace(part, labels=part.labels[order])


def test_settings_are_chosen_without_test_images(material: Material) -> None:
    nothing: Any = None
    blind = replace(material, test=nothing)
    assert features.tune(ROW, blind, PLAN, seed=0) == 1
    chosen = NETWORKS["lenet"].tune(blind, MeasurementConfig(budgets=(5,), tuning_images=100), seed=0)
    assert set(chosen) == {"5", "all"}


def test_settings_follow_held_out_labels(material: Material) -> None:
    """Where those are the other way round, so is the choice: what is useful becomes worse than a guess."""
    reverse = replace(material, held_out=replace(material.held_out, labels=(material.held_out.labels + 5) % 10))
    assert features.tune(ROW, reverse, PLAN, seed=0) == 0


def test_readouts_are_chosen_by_held_out_labels_and_judged_by_test_labels(material: Material) -> None:
    [known], *_ = features.evaluate(ROW, 1, material, PLAN, seed=0)
    [other], *_ = features.evaluate(ROW, 1, replace(material, test=shuffled(material.test)), PLAN, seed=0)
    assert other.held_out == known.held_out
    for name in ("accuracy", "kernel"):
        assert getattr(known, name)["all"] > 0.8
        assert getattr(other, name)["all"] < 0.3
    [other], *_ = features.evaluate(ROW, 1, replace(material, held_out=shuffled(material.held_out)), PLAN, seed=0)
    assert max(other.held_out.values()) < 0.3
    # a penalty by chance costs less than what has no labels at all
    assert known.accuracy["5"] + 0.02 > other.accuracy["5"] > 0.3


@pytest.mark.parametrize("part", ["held_out", "test"])
def test_noise_and_transfer_are_judged_by_test_images(part: str, material: Material) -> None:
    """Without the others' labels they find the same, but for a penalty that is chosen by chance."""
    altered = replace(material, **{part: shuffled(getattr(material, part))})
    judged = features.with_noise(ROW, 1, altered, PLAN, seed=0)[0]["0"]
    transferred = features.transferred(Blurred(1), ROW.views, altered, material.source, (None,), seed=0)[0]["all"]
    for found in (judged, transferred):
        assert (found > 0.6) == (part == "held_out")
