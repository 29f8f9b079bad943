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
from simmatch.model import InputConfig, pooled

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


def assert_equal(stack: Stack, expected: Stack) -> None:
    for (name, one), other in zip(stack.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


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
