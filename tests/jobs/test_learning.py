"""What learning must be worth, on the 8 × 8 digits: margins that hold for every seed.

Label subsets differ more than learners do, so an accuracy here is the mean over ten of them, the same for all.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.evaluation.learners import FeatureLearner, Pixels, PooledFeatures, Shape, no_progress
from jobs.evaluation.material import Material
from jobs.evaluation.readouts import choose_ridge
from jobs.evaluation.rivals import RIVALS
from jobs.evaluation.stacks import StackLearner
from simmatch.config import ModelConfig, parse
from simmatch.data.sources import Dataset
from simmatch.readout import accuracy

SEEDS = (0, 1, 2)
SUBSETS = 10
LABELS = 10
SHAPE = Shape(channels=32, kernel_size=4, pool=3)
POOL = 4


def conv(channels: int, kernel_size: int, *, padding: int = 0, pool: int | None = None) -> dict[str, Any]:
    """An unsupervised layer on whitened, contrast-normalised patches."""
    return {
        "out_channels": channels,
        "kernel_size": kernel_size,
        "padding": padding,
        "normalize": "contrast",
        "whiten": True,
        "pool": pool,
        "power": 0.5,
        "train": {"batch_size": 50, "positions": 16, "epochs": 2},
    }


def learnt(layers: list[dict[str, Any]], material: Material, pool: int, seed: int) -> StackLearner:
    stack = StackLearner(parse(ModelConfig, {"layers": layers}), material.source, seed, pool=pool)
    stack.fit(material.train.images, material.train.labels)
    return stack


@pytest.fixture(scope="module")
def material(digits: Dataset) -> Material:
    return Material.of(digits, 150)


def worth(learner: FeatureLearner, material: Material, block: int = 0) -> float:
    """Test accuracy at ten labels per class of a block's features, mean over label subsets."""
    train, held_out, test = (
        learner.outputs(part.images)[0][block] for part in (material.train, material.held_out, material.test)
    )
    total = 0.0
    for seed in range(SUBSETS):
        index = material.labelled(LABELS, seed)
        readout, _ = choose_ridge(
            (train[index], material.train.labels[index]), (held_out, material.held_out.labels), 10
        )
        total += accuracy(readout.scores(test), material.test.labels)
    return total / SUBSETS


def random_filters(material: Material, seed: int) -> PooledFeatures:
    """The same geometry, normalisation and whitening, rectified Gaussian filters."""
    rival = RIVALS["random"]
    drawn = PooledFeatures(rival(SHAPE, rival.candidates[0], seed), SHAPE, material.source.image_size, no_progress)
    drawn.fit(material.train.images, material.train.labels)
    return drawn


@pytest.mark.slow
def test_learnt_features_beat_pixels_and_random_filters(material: Material) -> None:
    pixels = worth(Pixels(), material)
    layer = conv(SHAPE.channels, SHAPE.kernel_size)
    found = [worth(learnt([layer], material, SHAPE.pool, seed), material) for seed in SEEDS]
    drawn = [worth(random_filters(material, seed), material) for seed in SEEDS]
    assert min(found) > pixels + 0.03  # found 0.05
    assert mean(found) > mean(drawn) + 0.005  # found 0.013


@pytest.mark.slow
def test_the_second_layer_helps_a_narrow_first(material: Material) -> None:
    for seed in SEEDS:
        stack = learnt([conv(8, 5, padding=2, pool=8), conv(64, 3, padding=1, pool=POOL)], material, POOL, seed)
        assert worth(stack, material, block=1) > worth(stack, material, block=0) + 0.01, seed  # found 0.017 to 0.035


def alignment(code: Tensor, labels: Tensor) -> float:
    """Centred kernel alignment ⟨K, L⟩ / (‖K‖ ‖L‖) of codes [N, K] and labels: 1 where codes are the classes.

    Source: Cortes, Mohri & Rostamizadeh, "Algorithms for learning kernels based on centered alignment" (2012), def. 4.
    """
    code = code - code.mean(dim=0)
    target = torch.nn.functional.one_hot(labels).to(code.dtype)
    target = target - target.mean(dim=0)
    return float((code.T @ target).square().sum() / ((code.T @ code).norm() * (target.T @ target).norm()))


@pytest.mark.parametrize("seed", SEEDS)
def test_supervision_aligns_the_code_with_the_classes(seed: int, material: Material) -> None:
    """On test images, whose labels nobody has seen."""

    def code(gain: float) -> Tensor:
        layer = {
            "out_channels": 40,
            "kernel_size": "full",
            "whiten": True,
            "supervised": True,
            "label_gain": gain,
            "train": {"batch_size": 50, "epochs": 2},
            "plasticity": {"lr": 0.1, "lr_decay_steps": 10, "tau": 0.5},
            "dynamics": {"tolerance": 1e-3},
        }
        learner = StackLearner(parse(ModelConfig, {"layers": [layer]}), material.source, seed, pool=1)
        learner.fit(material.train.images, material.train.labels)
        return learner.outputs(material.test.images)[0][0]

    labels = material.test.labels
    with_labels, without = alignment(code(1000.0), labels), alignment(code(0.0), labels)
    assert with_labels > without + 0.04, (with_labels, without)  # found 0.08 to 0.2
