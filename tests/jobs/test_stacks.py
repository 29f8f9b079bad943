"""Stacks as learners of the comparison: taught as a rank is, and counted by what their weights weigh."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import RunConfig
from cluster.training import Assignment, Training
from jobs.evaluation import stacks
from jobs.evaluation.learners import BATCH
from jobs.evaluation.nonnegative import COUNTED_IMAGES, NonnegativeCodes
from jobs.evaluation.stacks import StackLearner
from simmatch.config import ModelConfig, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack, pooled
from simmatch.sharding.mesh import Mesh

SOURCE = InputConfig(in_channels=1, height=8, width=8, num_classes=10)

LAYERS: list[dict[str, Any]] = [
    {
        "out_channels": 8,
        "kernel_size": 3,
        "normalize": "contrast",
        "whiten": True,
        "pool": 3,
        "power": 0.5,
        "train": {"images": 200, "batch_size": 20, "positions": 10},
        "dynamics": {"solver": "coordinate_descent", "exchange": "gather_state"},
    },
    {
        "out_channels": 12,
        "kernel_size": "full",
        "whiten": True,
        "supervised": True,
        "label_gain": 30.0,
        "train": {"epochs": 2, "batch_size": 50},
        "dynamics": {"solver": "coordinate_descent", "exchange": "gather_state", "tolerance": 1e-3},
    },
]

MODEL = {"layers": LAYERS}


class Silent:
    """A report that nobody reads."""

    stopping = False

    def beat(self) -> None:
        pass

    def send(self, *_: object, **__: object) -> None:
        pass

    def progress(self, *_: object, **__: object) -> None:
        pass


def learnt(digits: Dataset, seed: int = 0) -> StackLearner:
    learner = StackLearner(parse(ModelConfig, MODEL), SOURCE, seed, pool=3)
    learner.fit(to_unit(digits.train_images, torch.float32), digits.train_labels)
    return learner


def test_layers_that_learn_together_are_those_of_the_trainer(digits: Dataset) -> None:
    """To the bit, by the activities solved to the tolerance that the comparison uses throughout."""
    layers = [{**layer, "train": {"batch_size": 100, "start_after": 3 * index}} for index, layer in enumerate(LAYERS)]
    config = parse(ModelConfig, {"layers": layers, "schedule": "together"})
    learner = StackLearner(config, SOURCE, seed=0, pool=3)
    images = to_unit(digits.train_images, torch.float32)
    learner.fit(images, digits.train_labels)
    stack = Trainer(
        Stack(config, SOURCE, seed=0), images, digits.train_labels, encode_batch=BATCH, to_tolerance=True
    ).fit()
    for name, value in learner.stack.state_dict().items():
        assert torch.equal(value, stack.state_dict()[name]), name
    blocks, scores = learner.outputs(images)
    assert [block.shape for block in blocks] == [(1437, 8 * 3 * 3), (1437, 12)]
    assert scores is not None
    assert (scores.argmax(dim=1) == digits.train_labels).float().mean() > 0.5  # chance is 0.1


def test_the_first_layer_is_the_one_that_a_rank_learns(digits: Dataset, tmp_path: Path) -> None:
    """To the bit, where the solver and the blocks of the calibration are the same; from there on a rank encodes with
    fixed iterations."""
    values = {"name": "test", "data": {"name": "digits"}, "model": MODEL, "probe": {"readout": "ridge"}}
    config = parse(RunConfig, {**values, "encode_batch": BATCH})
    rank = Training(Assignment(config, tmp_path, 0), Mesh(), Silent(), torch.device("cpu"))  # type: ignore[arg-type]
    rank.run()
    ours, theirs = learnt(digits).stack.layer(0), rank.stack.layer(0)
    assert torch.equal(ours.feedforward, theirs.feedforward)
    assert torch.equal(ours.lateral, theirs.lateral)
    assert int(ours.updates) == 10


def test_outputs_are_activities_on_small_maps(digits: Dataset) -> None:
    learner = learnt(digits)
    images = to_unit(digits.test_images[:300], torch.float32)
    blocks, scores = learner.outputs(images)
    assert [list(block.shape) for block in blocks] == [[300, 8 * 9], [300, 12]]
    assert scores is not None
    with torch.no_grad():
        y = learner.stack.layer(0).solve(images).y
        x = pooled(y, learner.config.layers[0])
        code = learner.stack.layer(1).solve(x).y.flatten(1)
    torch.testing.assert_close(blocks[0].sqrt(), x.flatten(1))  # what is passed on has taken its power
    torch.testing.assert_close(blocks[1], code)
    label = learner.stack.layer(1).label
    distances = torch.cdist(code, label.T)
    assert torch.equal(scores.argmax(dim=1), distances.argmin(dim=1))
    assert learner.active()[0] == pytest.approx(float((y > 0).double().mean()))
    learner.pool = 1
    small, _ = learner.outputs(images)
    torch.testing.assert_close(small[0], y.mean(dim=(2, 3)))
    learner.pool = 50
    whole, _ = learner.outputs(images)
    torch.testing.assert_close(whole[0], y.flatten(1))  # smaller already


def test_what_was_encoded_to_learn_is_not_encoded_again(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    images = to_unit(digits.train_images, torch.float32)
    learner = StackLearner(parse(ModelConfig, MODEL), SOURCE, 0, pool=3)
    learner.fit(images, digits.train_labels)
    solved: list[int] = []
    solve = SimilarityMatchingConv2d.solve

    def recorded(layer: SimilarityMatchingConv2d, x: Tensor, **options: Any) -> Any:
        solved.append(layer.out_channels)
        return solve(layer, x, **options)

    monkeypatch.setattr(SimilarityMatchingConv2d, "solve", recorded)
    blocks, scores = learner.outputs(images)
    assert solved == []
    shares = learner.active()
    again, others = learner.outputs(images.clone())
    assert set(solved) == {8, 12}
    for one, other in zip([*blocks, scores], [*again, others], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert shares == pytest.approx(learner.active())


def test_of_a_stack_the_first_layers_can_be_learnt_alone(digits: Dataset) -> None:
    images, whole = to_unit(digits.train_images, torch.float32), learnt(digits)
    learner = StackLearner(parse(ModelConfig, MODEL), SOURCE, 0, pool=3)
    learner.fit(images, depth=1)  # no labels: the supervised layer is left alone
    blocks, scores = learner.outputs(images[:50])
    assert scores is None
    assert torch.equal(blocks[0], whole.outputs(images[:50])[0][0])
    assert len(blocks) == len(learner.active()) == 1
    assert int(learner.stack.layer(1).updates) == 0


def test_learning_is_repeatable_and_depends_on_the_seed(digits: Dataset) -> None:
    first, again, other = learnt(digits), learnt(digits), learnt(digits, seed=1)
    for name, values in first.stack.state_dict().items():
        assert torch.equal(values, again.stack.state_dict()[name]), name
    assert not torch.equal(first.stack.layer(0).feedforward, other.stack.layer(0).feedforward)


def test_a_supervised_layer_asks_for_labels(digits: Dataset) -> None:
    learner = StackLearner(parse(ModelConfig, MODEL), SOURCE, 0)
    with pytest.raises(ValueError, match="labels: expected one for every image, layer 1 is supervised"):
        learner.fit(to_unit(digits.train_images, torch.float32))


def test_cost_counts_what_is_held_and_done(digits: Dataset) -> None:
    learner, images = learnt(digits), to_unit(digits.train_images, torch.float32)[:COUNTED_IMAGES]
    first = learner.cost(1)
    assert first.trained == 8 * 9 + 8 * 8 + 9 * 9 + 9  # W, M, Π, μ
    assert first.inference == 8 * 9 + 8 * 8 + 8  # W Π, M, an offset
    layer = learner.stack.layer(0)
    iterations = NonnegativeCodes(layer.lateral, layer.dynamics.tolerance).mean_iterations(layer.drive(images))
    assert 1 <= iterations < 20
    assert first.operations == round(36 * 8 * (9 + iterations * 8))  # 6 × 6 positions
    both = learner.cost(2)
    assert both.trained - first.trained == 12 * 72 + 12 * 12 + 12 * 10 + 72 * 72 + 72
    assert 12 * 72 + 12 * 12 <= both.operations - first.operations <= 12 * (72 + 20 * 12)
    with pytest.raises(ValueError, match=r"expected fit\(\) before anything is counted"):
        StackLearner(parse(ModelConfig, MODEL), SOURCE, 0).cost(1)


def test_seconds_are_those_of_each_layer(digits: Dataset) -> None:
    learner, started = StackLearner(parse(ModelConfig, MODEL), SOURCE, 0), time.monotonic()
    learner.fit(to_unit(digits.train_images, torch.float32), digits.train_labels)
    assert 0 < learner.seconds(1)[0] < learner.seconds(2)[0] < time.monotonic() - started
    started = time.monotonic()
    learner.outputs(to_unit(digits.test_images, torch.float32))
    assert 0 < learner.seconds(1)[1] < learner.seconds(2)[1] < time.monotonic() - started


def test_layers_that_learn_together_take_turns_in_seconds_too(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for every look at the clock: each update of the pass has one for layer 0, and for layer 1 one of its
    update and one of encoding its input."""
    clock = count()
    monkeypatch.setattr(stacks, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    layers = [{**layer, "train": {"images": 200, "batch_size": 20}} for layer in LAYERS]
    learner = StackLearner(parse(ModelConfig, {"layers": layers, "schedule": "together"}), SOURCE, 0)
    learner.fit(to_unit(digits.train_images, torch.float32), digits.train_labels)
    updates, others = 10, 8  # at most: calibration in six parts, the end, scaling V
    assert updates <= learner.fit_seconds[0] <= updates + others
    assert 2 * updates <= learner.fit_seconds[1] <= 2 * updates + others
