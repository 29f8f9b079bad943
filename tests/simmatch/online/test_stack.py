"""A stream of batches against the trainer and against a slow loop; states, classes, late labels, rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch import ModelConfig, Stack, Trainer
from simmatch.config import parse
from simmatch.data.order import Batches
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.observer import Observer, Pass
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State, digest, load_state, save_state

SEED, BATCH, CLASSES = 3, 20, 4
TRAIN = {"batch_size": BATCH}

SIGNALS: list[dict[str, Any]] = [
    {"out_channels": 8, "kernel_size": [1, 7], "stride": [1, 3], "whiten": True, "whiten_images": 70, "pool": [1, 6]},
    {"out_channels": 6, "kernel_size": [1, 2], "supervised": True, "label_gain": 2.0, "whiten": True, "power": 0.5},
    {"out_channels": 7, "kernel_size": "full", "supervised": True},
]
IMAGES: list[dict[str, Any]] = [
    {"out_channels": 8, "kernel_size": 3, "normalize": "contrast", "pool": 3},
    {"out_channels": 9, "kernel_size": "full", "whiten": True, "supervised": True, "label_gain": 30.0},
]


def model_of(
    layers: list[dict[str, Any]], starts: tuple[int, ...] = (), *, exchange: str = "every_iteration", **others: Any
) -> ModelConfig:
    values = []
    for index, layer in enumerate(layers):
        train = {**TRAIN, **layer.get("train", {}), "start_after": starts[index] if starts else 0}
        values.append({**layer, "train": train, "dynamics": {"tolerance": 1e-3, "exchange": exchange}})
    return parse(ModelConfig, {"layers": values, "schedule": "together", **others})


def records(height: int, width: int, count: int = 130) -> tuple[Tensor, Tensor]:
    """Bars at random places over noise, and their classes, half of them unknown; one batch has none that is known."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = 0.3 * torch.rand(count, 1, height, width, generator=generator)
    for image, label in zip(x, labels, strict=True):
        place = int(torch.randint(width - 4, (1,), generator=generator))
        image[..., place : place + 1 + int(label)] += 1.0
    labels[torch.rand(count, generator=generator) < 0.5] = UNLABELLED
    return x, labels


CASES = {
    "one layer": (model_of(SIGNALS[:1]), 1),
    "one layer, columns": (model_of(SIGNALS[:1], exchange="gather_state"), 1),
    "some positions": (model_of([{**SIGNALS[0], "train": {"positions": 5}}]), 1),
    "signals": (model_of(SIGNALS), 1),
    "signals, one after the other": (model_of(SIGNALS, (0, 2, 3), freeze_below=True), 1),
    "images": (model_of(IMAGES, (0, 2), exchange="gather_state"), 6),
}


def stream_of(x: Tensor) -> list[Tensor]:
    """The batches of the trainer, whose last one is smaller."""
    batches = Batches(len(x), BATCH, epochs=1, seed=SEED)
    return [batches[number] for number in range(len(batches))]


def online_of(model: ModelConfig, x: Tensor, **options: Any) -> OnlineStack:
    return OnlineStack(model, InputConfig.of(x, CLASSES), seed=SEED, **options)


def learnt_from(
    online: OnlineStack, x: Tensor, labels: Tensor, batches: list[Tensor], *, reuse: bool = True
) -> OnlineStack:
    for chosen in batches:
        encoded = online.encode(x[chosen])
        if not reuse:
            object.__setattr__(encoded, "solved", {})
        online.learn(encoded, labels[chosen])
    return online


class Last(Observer):
    """Keeps the state of all layers after the last update of the pass, before the trainer completes them."""

    def passed(self, done: Pass) -> None:
        self.states = [copied(layer) for layer in done.layers.values()]


def copied(layer: torch.nn.Module) -> State:
    return {name: each.clone() for name, each in layer.state_dict().items()}


def states(online: OnlineStack) -> list[str]:
    return [digest(copied(layer)) for layer in online.stack.layers]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_stream_gives_the_bits_of_the_trainer(case: tuple[ModelConfig, int]) -> None:
    model, height = case
    x, labels = records(height, 40 if height == 1 else 6)
    last = Last()
    Trainer(Stack(model, InputConfig.of(x, CLASSES), seed=SEED), x, labels, to_tolerance=True, observer=last).fit()
    for reuse in (True, False):
        online = online_of(model, x)
        online.calibrate(x)
        learnt_from(online, x, labels, stream_of(x), reuse=reuse)
        assert states(online) == [digest(each) for each in last.states], reuse


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_goes_on_from_a_state_to_the_same_bits(case: tuple[ModelConfig, int], after: int, tmp_path: Path) -> None:
    model, height = case
    x, labels = records(height, 40 if height == 1 else 6)
    batches, rate = stream_of(x), RateConfig(kind="after_drift", decay_steps=3, hold=1)
    online = online_of(model, x, rate=rate)
    online.calibrate(x)
    learnt_from(online, x, labels, batches[:after])
    online.raise_rate()
    save_state(online.state(), tmp_path / "state")
    other = online_of(model, x, rate=rate)
    other.restore(load_state(tmp_path / "state"))
    assert digest(other.state()) == digest(online.state())
    for stack in (online, other):
        learnt_from(stack, x, labels, batches[after:])
        stack.learn_labels(x[:7], labels[:7])
    assert digest(other.state()) == digest(online.state())
    assert digest(dict(enumerate_outputs(other, x))) == digest(dict(enumerate_outputs(online, x)))


def enumerate_outputs(online: OnlineStack, x: Tensor) -> list[tuple[str, Tensor]]:
    encoded = online.encode(x[:9])
    scores = [] if encoded.label_scores is None else [("scores", encoded.label_scores)]
    return [("features", encoded.features), *encoded.signals.items(), *scores]
