"""A stream of batches against the trainer and against a slow loop; states, classes, late labels, rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch import ConfigError, ModelConfig, Stack, Trainer
from simmatch.config import parse
from simmatch.data.order import Batches
from simmatch.geometry import explicit
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig, load_model, save_model
from simmatch.observer import Observer, Pass
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import State, digest, load_state, save_state
from simmatch.sharding.faults import SharedFault
from simmatch.solvers.dynamics import Dynamics

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
        dynamics = {"tolerance": 1e-3, **layer.get("dynamics", {}), "exchange": exchange}
        values.append({**layer, "train": train, "dynamics": dynamics})
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


def online_of(model: ModelConfig, x: Tensor, *, classes: int = CLASSES, **options: Any) -> OnlineStack:
    return OnlineStack(model, InputConfig.of(x, classes), seed=SEED, **options)


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
        stack.learn_labels(stack.encode(x[:7]), labels[:7])
    assert digest(other.state()) == digest(online.state())
    assert digest(dict(enumerate_outputs(other, x))) == digest(dict(enumerate_outputs(online, x)))


def enumerate_outputs(online: OnlineStack, x: Tensor) -> list[tuple[str, Tensor]]:
    encoded = online.encode(x[:9])
    scores = [] if encoded.label_scores is None else [("scores", encoded.label_scores)]
    return [("features", encoded.features), *encoded.signals.items(), *scores]


def test_what_was_encoded_is_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer: one solution a batch. Where labels drive the activities, another; and after other weights, too."""
    solved: list[int] = []
    solve = Dynamics.solve

    def counted(self: Dynamics, drive: Tensor, *args: Any, **options: Any) -> Any:
        solved.append(drive.shape[1])
        return solve(self, drive, *args, **options)

    monkeypatch.setattr(Dynamics, "solve", counted)
    for layer, labelled, expected in ((SIGNALS[0], False, 1), (IMAGES[1], False, 1), (IMAGES[1], True, 2)):
        for exchange in ("every_iteration", "gather_state"):
            x, labels = records(1, 40)
            online = online_of(model_of([{**layer, "kernel_size": [1, 7]}], exchange=exchange), x)
            online.calibrate(x)
            solved.clear()
            stale = online.encode(x[:5])
            online.learn(stale, labels[:5] if labelled else torch.full((5,), UNLABELLED))
            assert len(solved) == expected
            online.learn(stale)
            assert len(solved) == expected + 1


def test_a_batch_of_weights_zero_changes_nothing() -> None:
    x, labels = records(1, 40)
    online = online_of(model_of(SIGNALS), x)
    online.calibrate(x)
    online.learn(online.encode(x[:9]), labels[:9])
    before = digest(online.state())
    online.learn(online.encode(x[:9]), labels[:9], torch.zeros(9))
    assert digest(online.state()) == before
    online.learn(online.encode(x[:9]), labels[:9], torch.linspace(0, 1, 9))
    assert digest(online.state()) != before


def test_weights_of_one_change_no_bit() -> None:
    x, labels = records(1, 40)
    found = []
    for weights in (None, torch.ones(9)):
        online = online_of(model_of(SIGNALS), x)
        online.calibrate(x)
        online.learn(online.encode(x[:9]), labels[:9], weights)
        found.append(digest(online.state()))
    assert found[0] == found[1]


@pytest.mark.parametrize("gain", [0.0, 5.0])
def test_late_labels_teach_v_as_labels_in_time_do(gain: float) -> None:
    """V and the class frequency after a batch whose labels came late, with W and M as they were before it."""
    x, labels = records(6, 6)
    model = model_of([{"out_channels": 9, "kernel_size": "full", "supervised": True, "label_gain": gain}])
    late, in_time = (online_of(model, x) for _ in range(2))
    for online in (late, in_time):
        online.calibrate(x)
        learnt_from(online, x, labels, stream_of(x)[:3])
    before = digest(late.state())
    late.learn_labels(late.encode(x[:20]), torch.full((20,), UNLABELLED))
    assert digest(late.state()) == before
    kept = copied(late.stack.layer(0))
    late.learn_labels(late.encode(x[:20]), labels[:20])
    in_time.learn(in_time.encode(x[:20]), labels[:20])
    for name in ("label", "class_frequency"):
        assert torch.equal(late.stack.layer(0).get_buffer(name), in_time.stack.layer(0).get_buffer(name)), name
    for name in kept.keys() - {"label", "class_frequency"}:
        assert torch.equal(late.stack.layer(0).get_buffer(name), kept[name]), name
    for name in ("label_yz", "label_zz"):
        assert torch.equal(late.state()[name], in_time.state()[name]), name


def test_late_labels_of_records_that_were_encoded_before_an_update() -> None:
    """They are encoded once more, by the stack as it is now."""
    x, labels = records(6, 6)
    model = model_of([{"out_channels": 9, "kernel_size": "full", "supervised": True}])
    now, before = (online_of(model, x) for _ in range(2))
    for online in (now, before):
        online.calibrate(x)
        early = online.encode(x[:20])
        learnt_from(online, x, labels, stream_of(x)[:3])
        online.learn_labels(early if online is before else online.encode(x[:20]), labels[:20])
    assert digest(before.state()) == digest(now.state())


def test_scores_are_those_of_an_exported_v_and_of_classes_that_were_seen(tmp_path: Path) -> None:
    """They find the classes of bars, from few labels; the exported stack solves by fixed iterations, so nearly."""
    x, labels = records(6, 6, count=600)
    labels[labels == 3] = UNLABELLED
    online = online_of(model_of(IMAGES), x)
    online.calibrate(x)
    assert online.encode(x[:5]).label_scores is None
    learnt_from(online, x, labels, list(torch.arange(600).split(BATCH)))
    scores = online.encode(x).label_scores
    assert scores is not None
    assert bool((scores[:, 3] == -torch.inf).all())
    known = labels != UNLABELLED
    assert float((scores.argmax(dim=1) == labels)[known].double().mean()) > 0.7  # chance is a third
    save_model(online.export(), tmp_path)
    exported = load_model(tmp_path)
    assert digest({"v": exported.layer(0).label}) == digest({"v": online.stack.layer(0).label})
    agree = exported.decode(x)[:, :3].argmax(dim=1) == scores[:, :3].argmax(dim=1)
    assert float(agree.double().mean()) > 0.98


def test_classes_that_come_later() -> None:
    """What V has learnt of the others stays; a stack with all classes from the start learns the same W and M where no
    label drives them, and its V agrees once the frequencies do."""
    x, labels = records(6, 6)
    model = model_of([{"out_channels": 9, "kernel_size": "full", "supervised": True}])
    growing, whole = OnlineStack(model, InputConfig.of(x, 2), seed=SEED), online_of(model, x)
    first = labels.where(labels < 2, UNLABELLED)
    for online in (growing, whole):
        online.calibrate(x)
        learnt_from(online, x, first, stream_of(x)[:3])
    before = growing.stack.layer(0).label.clone()
    growing.grow(CLASSES)
    assert torch.equal(growing.stack.layer(0).label, torch.nn.functional.pad(before, (0, 2)))
    assert float(growing.stack.layer(0).class_frequency.sum()) == pytest.approx(1.0)
    assert growing.source.num_classes == growing.stack.layer(0).num_classes == CLASSES
    other = OnlineStack(model, InputConfig.of(x, 2), seed=SEED)
    other.restore(growing.state())  # of more classes than it was made for
    for online in (growing, whole, other):
        learnt_from(online, x, labels, stream_of(x)[3:])
    assert digest(other.state()) == digest(growing.state())
    for name in ("feedforward", "lateral"):
        assert torch.equal(growing.stack.layer(0).get_buffer(name), whole.stack.layer(0).get_buffer(name))
    assert bool((growing.stack.layer(0).label[:, 2:] != 0).any())
    with pytest.raises(ValueError, match=r"num_classes: expected at least 4, the classes so far, got 3"):
        growing.grow(3)


@pytest.mark.parametrize("supervised", [(True, False), (True, True), (False, True)])
def test_goes_on_with_classes_that_came_later_in_any_layer(supervised: tuple[bool, bool]) -> None:
    x, labels = records(6, 12)
    layers = [
        {"out_channels": 8, "kernel_size": 3, "pool": 2, "supervised": supervised[0]},
        {"out_channels": 6, "kernel_size": "full", "supervised": supervised[1]},
    ]
    first, second = (OnlineStack(model_of(layers), InputConfig.of(x, 2), seed=SEED) for _ in range(2))
    first.calibrate(x)
    first.grow(CLASSES)
    learnt_from(first, x, labels, stream_of(x)[:2])
    second.restore(first.state())
    for online in (first, second):
        learnt_from(online, x, labels, stream_of(x)[2:])
    assert digest(second.state()) == digest(first.state())


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    x, labels = records(6, 6)
    layer = {"out_channels": 9, "kernel_size": 3, "supervised": True}
    own = online_of(model_of([layer, {**layer, "out_channels": 5}]), x)
    own.calibrate(x)
    learnt_from(own, x, labels, stream_of(x)[:2])
    wider, before = online_of(model_of([layer]), torch.zeros(1, 1, 6, 7)), digest(own.state())
    others = {
        r"label_yz: expected \[5, 4\], got \[9, 4\] in the state": online_of(model_of([layer]), x).state(),
        r"layers.1.label: expected \[5, 4\], got \[5, 3\]": {**own.state(), "layers.1.label": torch.zeros(5, 3)},
        r"layers.1.rate_from: expected \[\], got nothing": {
            name: each for name, each in own.state().items() if name != "layers.1.rate_from"
        },
        r"layers.2.label: expected nothing, got \[1\]": {**own.state(), "layers.2.label": torch.zeros(1)},
        "images: expected .*6, 6.*, got nothing": {k: v for k, v in own.state().items() if k != "images"},
    }
    for message, state in others.items():
        with pytest.raises(ValueError, match=message):
            own.restore(state)
        assert digest(own.state()) == before
    with pytest.raises(ValueError, match=r"images: expected \[0, 1, 6, 6\], got \[0, 1, 6, 7\]"):
        online_of(model_of([layer]), x).restore(wider.state())


def test_an_update_that_fails_changes_nothing() -> None:
    x, labels = records(6, 6)
    online = online_of(model_of([{"out_channels": 9, "kernel_size": "full", "supervised": True}]), x)
    online.calibrate(x)
    encoded, before = online.encode(x[:5]), digest(online.state())
    encoded.x.fill_(torch.nan)
    object.__setattr__(encoded, "solved", {})
    with pytest.raises(SharedFault):
        online.learn(encoded, labels[:5].clamp(min=0))
    assert digest(online.state()) == before


def test_rates() -> None:
    """Against the equation, written out: updates since the last drift that counts, and the lowest rate."""
    x, _ = records(1, 40)

    def rates(**rate: Any) -> list[float]:
        online = online_of(model_of(SIGNALS[:1]), x, rate=RateConfig(**rate))
        online.calibrate(x)
        found = []
        for number in range(8):
            if number == 4:
                online.raise_rate()
            found.append(online.learning_rate)
            online.learn(online.encode(x[:4]))
        return found

    falling = [0.1 / (1 + number / 2) for number in range(8)]
    assert rates() == [0.1] * 8
    assert rates(kind="falling", decay_steps=2) == pytest.approx(falling, rel=1e-15)
    assert rates(kind="after_drift", decay_steps=2) == pytest.approx(falling[:4] + falling[:4], rel=1e-15)
    assert rates(kind="after_drift", decay_steps=2, hold=2) == pytest.approx([*falling[:4], 0.1, 0.1, *falling[:2]])
    assert rates(kind="falling", decay_steps=2, lowest=0.5) == pytest.approx([max(each, 0.05) for each in falling])


def test_a_falling_rate_is_that_of_the_trainer() -> None:
    model = model_of(SIGNALS[:1])
    x, labels = records(1, 40)
    online = online_of(model, x, rate=RateConfig(kind="falling", decay_steps=3))
    online.calibrate(x)
    learnt_from(online, x, labels, stream_of(x))
    plasticity = model.layers[0].plasticity.model_copy(update={"lr_decay_steps": 3})
    layers = (model.layers[0].model_copy(update={"plasticity": plasticity}),)
    last = Last()
    stack = Stack(model.model_copy(update={"layers": layers}), InputConfig.of(x, CLASSES), seed=SEED)
    Trainer(stack, x, to_tolerance=True, observer=last).fit()
    assert states(online) == [digest(each) for each in last.states]


def test_signals_of_a_record() -> None:
    """Against their definitions, record by record, at eight of the twelve positions; other records do not matter."""
    x, _ = records(1, 40)
    online = online_of(model_of(SIGNALS[:1]), x)
    online.calibrate(x)
    online.learn(online.encode(x[:20]))
    layer, encoded = online.stack.layer(0), online.encode(x[:6])
    for number in range(6):
        patches = layer.prepare(x[number : number + 1])
        chosen = [0, 1, 3, 4, 6, 7, 9, 10]
        inputs, y = explicit(patches)[chosen].double(), layer.solve(patches).y[0, :, 0, chosen].double()
        gram = inputs @ inputs.T
        objective = (gram - y.T @ y).square().sum() / gram.square().sum()
        drive = layer.feedforward.flatten(1).double() @ inputs.T
        residual = (drive - layer.lateral.double() @ y).norm() / drive.norm()
        expected = {"objective": objective, "residual": residual, "active": (y > 0).double().mean()}
        for name, value in expected.items():
            assert float(encoded.signals[name][number]) == pytest.approx(float(value), rel=1e-4), name
    blank = online.encode(torch.zeros(2, 1, 1, 40))
    assert all(bool(value.isfinite().all()) for value in blank.signals.values())


def test_images_as_they_are_stored() -> None:
    x, _ = records(6, 6)
    stored = (x / x.max() * 255).to(torch.uint8)
    online = online_of(model_of(IMAGES[:1]), x)
    online.calibrate(stored)
    assert torch.equal(online.encode(stored[:5]).x, stored[:5].float() / 255)


def test_bad_input() -> None:
    x, _ = records(1, 40)
    model = model_of(SIGNALS[:1])
    online = online_of(model, x)
    with pytest.raises(RuntimeError, match="encode: expected a calibrated stack"):
        online.encode(x)
    online.calibrate(x)
    with pytest.raises(RuntimeError, match="calibrate: expected one call, got another"):
        online.calibrate(x)
    for bad, given in ((x[:, :, :, 1:], r"\[130, 1, 1, 39\]"), (x[:0], r"\[0, 1, 1, 40\]"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"x: expected \[B, 1, 1, 40\], got {given}"):
            online.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model.schedule: expected together for a stream, got greedy"):
        online_of(model_of(SIGNALS).model_copy(update={"schedule": "greedy"}), x)
    falling = parse(ModelConfig, {"layers": [{**SIGNALS[0], "plasticity": {"lr_decay_steps": 5}}]})
    with pytest.raises(ConfigError, match=r"model.layers.0.plasticity.lr_decay_steps: expected null, .*, got 5"):
        online_of(falling, x)
    other = online_of(model_of(IMAGES[:1]), records(6, 6)[0])
    with pytest.raises(ValueError, match=r"images: expected \[0, 1, 6, 6\], got \[0, 1, 1, 40\] in the state"):
        other.restore(online.state())
