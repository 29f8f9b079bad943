"""All layers learning in one pass: against a slow loop written out here, over owners and stages, and after an end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor

from simmatch import ModelConfig, Stack
from simmatch.config import parse
from simmatch.data.order import epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, pooled
from simmatch.observer import Observer, Pass, Update
from simmatch.sharding.mesh import Mesh
from tests.exchanges import meshes, results, run_meshes

SEED = 5
TRAIN = {"epochs": 2, "images": 100, "batch_size": 30}  # eight updates; the last of an epoch has ten images
TOTAL = 8

LAYERS: list[dict[str, Any]] = [
    {
        "out_channels": 8,
        "kernel_size": 3,
        "normalize": "contrast",
        "whiten": True,
        "whiten_images": 150,
        "pool": 4,
        "power": 0.5,
        "train": {**TRAIN, "positions": 10},
    },
    {"out_channels": 6, "kernel_size": 2, "whiten": True, "whiten_images": 100, "train": TRAIN},
    {"out_channels": 5, "kernel_size": 2, "supervised": True, "label_gain": 1.0, "train": TRAIN},
    {
        "out_channels": 9,
        "kernel_size": "full",
        "whiten": True,
        "supervised": True,
        "label_gain": 30.0,
        "train": TRAIN,
        "dynamics": {"tolerance": 1e-3},
    },
]


def model_of(
    layers: int = 4, starts: tuple[int, ...] = (0, 0, 0, 0), *, exchange: str = "every_iteration", **others: Any
) -> ModelConfig:
    values = []
    for layer, start in zip(LAYERS[:layers], starts, strict=False):
        dynamics = {**layer.get("dynamics", {}), "exchange": exchange}
        values.append({**layer, "train": {**layer["train"], "start_after": start}, "dynamics": dynamics})
    return parse(ModelConfig, {"layers": values, "schedule": "together", **others})


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    return digits.train_images[:250]


@pytest.fixture(scope="module")
def labels(digits: Dataset) -> Tensor:
    return digits.train_labels[:250]


def stack_of(model: ModelConfig, images: Tensor) -> Stack:
    return Stack(model, InputConfig.of(images, 10), seed=SEED, dtype=torch.float64)


@torch.no_grad()
def slowly(model: ModelConfig, images: Tensor, labels: Tensor) -> Stack:
    """As the definition has it: batch after batch, layer after layer, on one rank."""
    stack, x = stack_of(model, images), to_unit(images, torch.float64)
    layers = [stack.layer(index) for index in range(len(model.layers))]
    starts = [config.train.start_after for config in model.layers]

    def encoded(x: Tensor, depth: int) -> Tensor:
        for layer, config in zip(layers[:depth], model.layers, strict=False):
            x = pooled(layer(x), config)
        return x

    order = [epoch_order(len(x), seed=SEED, epoch=epoch, images=100).split(30) for epoch in range(2)]
    for update, chosen in enumerate((*order[0], *order[1]), 1):
        for index, (layer, config) in enumerate(zip(layers, model.layers, strict=True)):
            if update <= starts[index]:
                break
            if update == starts[index] + 1:
                layer.calibrate(encoded(x[: config.whiten_images], index), config.whiten_patches)
            if not model.freeze_below or update <= (*starts[1:], TOTAL)[index]:
                patches = layer.prepare(encoded(x[chosen], index), config.train.positions)
                layer.partial_fit(patches, labels[chosen] if config.supervised else None)
    for index, (layer, config) in enumerate(zip(layers, model.layers, strict=True)):
        layer.recertify()
        if config.supervised:
            z = torch.nn.functional.one_hot(labels, 10).double()
            layer.settle_label(reduce(layer(encoded(x, index)), "b k h w -> k b", "mean") @ z, z.T @ z)
    return stack


def assert_close(stack: Stack, expected: Stack, tolerance: float) -> None:
    for (name, one), other in zip(stack.state_dict().items(), expected.state_dict().values(), strict=True):
        scale = float(other.abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale, msg=name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


SCHEDULES = {
    "at once": model_of(),
    "one after the other": model_of(starts=(0, 2, 2, 5)),
    "frozen below": model_of(starts=(0, 2, 4, 5), freeze_below=True),
}


@pytest.mark.parametrize("model", SCHEDULES.values(), ids=SCHEDULES)
def test_against_the_definition(model: ModelConfig, images: Tensor, labels: Tensor) -> None:
    """float64; images are encoded in parts of 70 here and at once there: products round differently."""
    trained = Trainer(stack_of(model, images), images, labels, encode_batch=70).fit()
    assert_close(trained, slowly(model, images, labels), 1e-9)


# -- over owners and stages --------------------------------------------------------------------------------------------


def train(
    mesh: Mesh,
    model: ModelConfig,
    images: Tensor,
    labels: Tensor,
    observer: Observer | None = None,
    saved: list[dict[str, Tensor]] | None = None,
) -> Stack:
    """What one rank does; `saved`: the state of every layer, whole, from which it goes on."""
    observer = observer or Follower(saved)
    return Trainer(stack_of(model, images), images, labels, mesh=mesh, encode_batch=70, observer=observer).fit()


def copied(layer: SimilarityMatchingConv2d) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in layer.state_dict().items()}


class Follower(Observer):
    """Restores layers, remembers them after every update of the pass, and ends or stops the pass."""

    def __init__(self, saved: list[dict[str, Tensor]] | None = None, *, stop_after: int | None = None) -> None:
        self.saved, self.last = saved, stop_after
        self.passes: list[Pass] = []
        self.updates: list[Update] = []
        self.states: list[dict[int, dict[str, Tensor]]] = []
        self.learnt_layers: dict[str, Tensor] = {}

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        for name, whole in (self.saved[index] if self.saved else {}).items():
            target = getattr(layer, name)
            sharded = target.ndim > 0 and len(target) < len(whole)
            target.copy_(whole[layer.rows.start : layer.rows.stop] if sharded else whole)

    def stop_after(self, number: int) -> bool:
        return number == self.last

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.learnt_layers |= {f"{index}.{name}": value for name, value in copied(layer).items()}

    def updated(self, update: Update) -> None:
        self.updates.append(update)

    def passed(self, done: Pass) -> None:
        self.passes.append(done)
        self.states.append(
            {
                index: {name: each.clone() for name, each in layer.state_dict().items()}
                for index, layer in done.layers.items()
            }
        )
        if done.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("exchange", ["every_iteration", "block", "gather_state"])
@pytest.mark.parametrize(("replicas", "owners"), [(1, 2), (1, 3), (2, 1), (2, 2)])
def test_owners_and_replicas(exchange: str, replicas: int, owners: int, images: Tensor, labels: Tensor) -> None:
    """float64: sums in another order, over few updates of a contracting rule. All ranks hold the same bits. `block`
    takes other iterations for another number of blocks: it agrees to the tolerance of the dynamics only."""
    model = model_of(3, (0, 2, 2), exchange=exchange)
    one = train(Mesh(), model, images, labels)
    found = results(run_meshes(meshes(replicas, 1, owners), lambda mesh: train(mesh, model, images, labels)))
    for other in found[1:]:
        assert_equal(other.state_dict(), found[0].state_dict())
    assert_close(found[0], one, 0.2 if exchange == "block" and owners > 1 else 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_give_the_same_bits(stages: int, name: str, images: Tensor, labels: Tensor) -> None:
    """Whichever stage is slow; V only until it is scaled, by sums over the images that every rank has encoded."""
    model, one = SCHEDULES[name], Follower()
    expected = train(Mesh(), model, images, labels, one)
    places, followers = (
        meshes(stages=stages, delays_s={stages - 1: 0.002 * stages}),
        [Follower() for _ in range(stages)],
    )
    found = results(run_meshes(places, lambda mesh: train(mesh, model, images, labels, followers[mesh.everyone.rank])))
    for stack, follower in zip(found, followers, strict=True):
        assert_equal(follower.learnt_layers, one.learnt_layers)
        assert_close(stack, expected, 1e-12)
