"""A stack that learns from a stream on a GPU, against the CPU: on one that is pretended, and on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch import ModelConfig, learning
from simmatch.config import parse
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig, load_model, save_model
from simmatch.online.rate import RateConfig
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State, digest, load_state, save_state
from simmatch.precision import exact_float32
from tests.pretended import Place

WIDTH, BATCH, BATCHES, CLASSES = 40, 20, 7, 4

FIRST = {
    "out_channels": 8,
    "kernel_size": [1, 7],
    "stride": [1, 3],
    "whiten": True,
    "whiten_images": 40,
    "pool": [1, 6],
}
SECOND = {"out_channels": 6, "kernel_size": "full", "supervised": True, "label_gain": 1.0}
PLAIN = {**FIRST, "normalize": "contrast", "whiten": False}


def model_of(*layers: dict[str, Any], exchange: str = "every_iteration") -> ModelConfig:
    dynamics = {"tolerance": 1e-4, "max_iterations": 1000, "exchange": exchange}
    return parse(ModelConfig, {"layers": [{**each, "dynamics": dynamics} for each in layers], "schedule": "together"})


MODELS = {
    "one layer": model_of(FIRST),
    "some positions": model_of({**PLAIN, "train": {"positions": 5}}, exchange="gather_state"),
    "labels drive": model_of(PLAIN, SECOND),
    "labels drive one of three": model_of(
        FIRST, {**SECOND, "kernel_size": [1, 2], "label_gain": 0.0}, SECOND, exchange="gather_state"
    ),
}


def records() -> tuple[Tensor, Tensor]:
    """Bumps of four widths over noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (160,), generator=generator)
    x = 0.3 * torch.rand(160, 1, 1, WIDTH, generator=generator)
    for window, label in zip(x, labels, strict=True):
        place = int(torch.randint(WIDTH - 8, (1,), generator=generator))
        window[..., place : place + 2 * int(label) + 1] += 1.0
    return x, labels


class Learner:
    """Learns from `records`: with weights, labels that are missing or late, classes that appear, and a drift."""

    def __init__(self, model: ModelConfig, device: str) -> None:
        rate = RateConfig(kind="after_drift", decay_steps=5, hold=1)
        source = InputConfig(in_channels=1, height=1, width=WIDTH, num_classes=2)
        self.stack = OnlineStack(model, source, seed=3, rate=rate, device=device)
        self.x, self.labels = records()
        self.readout: OnlineReadout | None = None

    def learn(self, first: int, last: int) -> Learner:
        """From batches `first` to `last` − 1."""
        if first == 0:
            self.stack.calibrate(self.x[:40])
        for number in range(first, last):
            if number == 3:
                self.stack.grow(CLASSES)
                self.stack.raise_rate()
            first_row = number * BATCH % len(self.x)
            rows = slice(first_row, first_row + BATCH)
            known = self.labels[rows].where(self.labels[rows] < self.stack.source.num_classes, UNLABELLED)
            encoded = self.stack.encode(self.x[rows]).told()
            weights = torch.linspace(0.2, 1.0, BATCH) if number % 2 else None
            self.stack.learn(encoded, known if number != 5 else None, weights)
            self.readout = self.readout or OnlineReadout(encoded.features.shape[1], ReadoutConfig(reservoir=30))
            self.readout.learn(encoded.features, known, weights, inputs=self.x[rows])
            late = self.stack.encode(self.x[rows][:7])
            self.stack.learn_labels(late, known[:7])
        return self

    def outputs(self) -> State:
        """What it says of some records, after the readout has been computed anew."""
        assert self.readout is not None
        self.readout.recompute(lambda x: self.stack.encode(x).features)
        told = self.stack.encode(self.x[-BATCH:]).told()
        scores = {} if told.label_scores is None else {"label scores": told.label_scores}
        found = {"features": told.features, **told.signals, **scores, "scores": self.readout.scores(told.features)}
        assert all(each is not None and each.device.type == "cpu" for each in found.values())
        return {name: each for name, each in found.items() if each is not None}


def assert_close(given: State, expected: State, tolerance: float) -> None:
    """All floats to a part of their norm, all else equal."""
    assert given.keys() == expected.keys()
    for name in expected:
        if name.endswith(".silent"):  # whether an activity is 0, or next to it
            continue
        found, value = given[name].cpu(), expected[name].cpu()
        assert found.shape == value.shape, name
        if not value.is_floating_point():
            assert torch.equal(found, value), name
        elif value.numel():
            finite = value.isfinite()
            assert torch.equal(found.isfinite(), finite), name
            off = torch.linalg.vector_norm((found - value)[finite].double())
            assert float(off) <= tolerance * float(torch.linalg.vector_norm(value[finite].double())) + 1e-6, name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_learns_what_it_learns_on_a_cpu(model: ModelConfig, card: Place) -> None:
    own, other = (Learner(model, device).learn(0, BATCHES) for device in ("cuda", "cpu"))
    assert own.stack.stack.layer(0).lateral.device.type == "cuda"
    assert_close(own.stack.state(), other.stack.state(), card.tolerance)
    assert_close(own.outputs(), other.outputs(), card.tolerance)
    assert own.stack.learning_rate == pytest.approx(other.stack.learning_rate)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_two_runs_give_the_same_bits(model: ModelConfig, cuda: torch.device) -> None:
    exact_float32()
    one, other = (Learner(model, str(cuda)).learn(0, BATCHES) for _ in range(2))
    assert digest(one.stack.state()) == digest(other.stack.state())
    assert digest(one.outputs()) == digest(other.outputs())


@pytest.mark.parametrize("name", ["some positions", "labels drive"])
def test_captured_updates_have_the_bits_of_others(
    name: str, card: Place, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Learner(MODELS[name], "cuda").learn(0, 15)
    assert len(replays) > 0
    monkeypatch.setattr(learning, "new_graph", lambda device: None)
    other = Learner(MODELS[name], "cuda").learn(0, 15)
    assert digest(own.stack.state()) == digest(other.stack.state())


@pytest.mark.parametrize("there", ["cuda", "cpu"])
def test_a_state_travels_both_ways(there: str, card: Place, tmp_path: Path) -> None:
    """The other device goes on from the same bits to the same values, and this one to the same bits."""
    model, back = MODELS["labels drive"], "cpu" if there == "cuda" else "cuda"
    own = Learner(model, there).learn(0, 4)
    save_state(own.stack.state(), tmp_path / "state")
    others = {device: Learner(model, device) for device in (there, back)}
    for other in others.values():
        other.stack.restore(load_state(tmp_path / "state"))
        assert digest(other.stack.state()) == digest(own.stack.state())
        other.learn(4, BATCHES)
    own.learn(4, BATCHES)
    assert digest(others[there].stack.state()) == digest(own.stack.state())
    assert_close(others[back].stack.state(), own.stack.state(), card.tolerance)


def test_an_export_is_that_of_the_cpu(card: Place, tmp_path: Path) -> None:
    own = Learner(MODELS["labels drive"], "cuda").learn(0, 4)
    save_model(own.stack.export(), tmp_path / "own")
    other = Learner(MODELS["labels drive"], "cpu")
    other.stack.restore(own.stack.state())
    save_model(other.stack.export(), tmp_path / "other")
    stacks = [load_model(tmp_path / name) for name in ("own", "other")]
    assert_close(*(dict(stack.state_dict()) for stack in stacks), 1e-4)
