"""`reduce: exact` through the trainer: calibration, learning, encoding, label weights; one digest for every layout."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import ConfigError, DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.sources import Dataset
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Update
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import SHARDED, replicated_state, shard_state
from tests.exchanges import meshes, results, run_meshes

IMAGES = 430
LAYOUTS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
"""Replicas × owners."""


def model_of(exchange: Any = "gather_state", schedule: Any = "greedy") -> ModelConfig:
    """Drawn positions and then a dense, whitened, supervised layer; the last batches have 30 images."""
    common: dict[str, Any] = {
        "dynamics": DynamicsConfig(exchange=exchange),
        "plasticity": PlasticityConfig(lr=0.2, lr_decay_steps=20, dead_after=3),
        "whiten": True,
        "whiten_images": 250,
        "whiten_patches": 3000,
    }
    first = LayerConfig(
        out_channels=9,
        kernel_size=3,
        normalize="contrast",
        pool=2,
        power=0.5,
        train=TrainConfig(batch_size=100, positions=12, epochs=2),
        **common,
    )
    last = LayerConfig(
        out_channels=13,
        kernel_size="full",
        supervised=True,
        label_gain=10.0,
        train=TrainConfig(batch_size=100, epochs=2, start_after=2 * (schedule == "together")),
        **common,
    )
    return ModelConfig(layers=(first, last), schedule=schedule)


class Stopped(Exception):
    pass


class Keeper(Observer):
    """Keeps a rank's rows of the layers, up to an update at which it stops; or puts back what was kept."""

    def __init__(self, stop: tuple[int, int] | None = None, kept: list[dict[str, Tensor]] | None = None) -> None:
        self.stop, self.kept = stop, kept
        self.states: dict[int, dict[str, Tensor]] = {}

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        if self.kept is None or index >= len(self.kept):
            return
        for name, value in self.kept[index].items():
            own = value[layer.rows.start : layer.rows.stop] if name in SHARDED else value
            getattr(layer, name).copy_(own)

    def updated(self, update: Update) -> None:
        state = shard_state(update.layer) | replicated_state(update.layer)
        self.states[update.index] = {name: tensor.clone() for name, tensor in state.items()}
        if (update.index, update.number) == self.stop:
            raise Stopped


def train(
    digits: Dataset, mesh: Mesh | None, *, schedule: str = "greedy", observer: Observer | None = None, **options: Any
) -> Stack:
    images, labels = digits.train_images[:IMAGES], digits.train_labels[:IMAGES]
    stack = Stack(model_of(schedule=schedule), InputConfig.of(images, num_classes=10), seed=3)
    return Trainer(
        stack, images, labels, mesh=mesh, observer=observer, encode_batch=60, reduce="exact", **options
    ).fit()


def digest(stack: Stack) -> str:
    """Of all tensors of a stack, those that are exported among them."""
    joined = hashlib.sha256()
    for name, tensor in sorted(stack.state_dict().items()):
        joined.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return joined.hexdigest()


@pytest.mark.parametrize("cache", [True, False])
def test_one_digest_at_every_layout(cache: bool, digits: Dataset) -> None:
    expected = digest(train(digits, None, cache=cache))
    for replicas, owners in LAYOUTS if cache else LAYOUTS[2::3]:
        ranks = meshes(replicas=replicas, owners=owners)
        stacks = results(run_meshes(ranks, lambda mesh: train(digits, mesh, cache=cache)))
        assert [digest(stack) for stack in stacks] == [expected] * len(stacks), (replicas, owners)


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 2, 1)])
def test_one_digest_of_layers_that_learn_together(layout: tuple[int, int, int], digits: Dataset) -> None:
    """Replicas × stages × owners."""
    expected = digest(train(digits, None, schedule="together"))
    stacks = results(run_meshes(meshes(*layout), lambda mesh: train(digits, mesh, schedule="together")))
    assert [digest(stack) for stack in stacks] == [expected] * len(stacks)


@pytest.mark.parametrize("stop", [(0, 3), (1, 4)])
def test_stopped_and_continued_at_another_layout(stop: tuple[int, int], digits: Dataset) -> None:
    """On three owners until an update, then on two replicas of two owners, and of one."""
    expected = digest(train(digits, None))
    keepers: dict[int, Keeper] = {}

    def until(mesh: Mesh) -> None:
        keeper = keepers[mesh.owners.rank] = Keeper(stop)
        with pytest.raises(Stopped):
            train(digits, mesh, observer=keeper)

    results(run_meshes(meshes(owners=3), until))
    kept = []
    for index in range(stop[0] + 1):
        parts = [keepers[rank].states[index] for rank in range(3)]
        kept.append(
            {name: torch.cat([p[name] for p in parts]) if name in SHARDED else parts[0][name] for name in parts[0]}
        )
    for replicas, owners in ((2, 2), (2, 1)):

        def on(mesh: Mesh) -> Stack:
            return train(digits, mesh, observer=Keeper(kept=kept))

        stacks = results(run_meshes(meshes(replicas=replicas, owners=owners), on))
        assert {digest(stack) for stack in stacks} == {expected}


def test_a_layer_that_cannot_be_exact_is_named(digits: Dataset) -> None:
    images = digits.train_images[:20]
    stack = Stack(model_of("block"), InputConfig.of(images, num_classes=10))
    expected = "reduce: expected fast with model.layers.0.dynamics.exchange: block, got exact, which needs gather_state"
    with pytest.raises(ConfigError, match=expected):
        Trainer(stack, images, digits.train_labels[:20], reduce="exact")
