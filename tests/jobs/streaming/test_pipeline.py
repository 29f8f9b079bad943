"""The pipeline: against a slow loop of its parts; restored at any batch it goes on to the same bits; bad records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.streaming import snapshots
from jobs.streaming.config import StreamConfig
from jobs.streaming.entries import Boundary, Entry
from jobs.streaming.outcome import Outcome
from jobs.streaming.records import Fault, LateLabel, Record
from jobs.streaming.state import StreamState
from simmatch.data.windows import WindowShape, scaled
from simmatch.model import InputConfig
from simmatch.online.novelty import NoveltyDetector
from simmatch.online.readout import OnlineReadout
from simmatch.online.stack import OnlineStack
from tests.jobs.streaming.streams import Item, small, waves

SHORT = {"layers": [{"out_channels": 4, "kernel_size": [1, 2]}]}
"""A model for windows of 4 samples."""

TWO = {"main": [], "slow": ["model.layers.0.plasticity.lr=0.01"]}


def entries(items: Sequence[Item], batch: int) -> Iterator[Entry]:
    """Items in batches of one size."""
    for index, item in enumerate(items):
        yield Entry(item)
        if index % batch == batch - 1:
            yield Entry(Boundary(index // batch + 1, "full"))


def applied(config: StreamConfig, items: Sequence[Item], batch: int = 8) -> list[Outcome]:
    """The outcomes of all batches."""
    state = StreamState(config)
    taken = (state.take(number, entry) for number, entry in enumerate(entries(items, batch)))
    return [state.pipeline.apply(each) for each in taken if each is not None]


def test_it_is_test_then_learn() -> None:
    """Against stack, readout and detector called in turn: the same answers, bit by bit."""
    config, items = small(), [item for item in waves(120) if isinstance(item, Record)]
    found = [answer for outcome in applied(config, items) for answer in outcome.answers]
    x = torch.from_numpy(np.stack([scaled(item.values.T[None], WindowShape(16, 16))[0] for item in items])[:, :, None])
    names = list(dict.fromkeys(item.label for item in items))
    labels = torch.tensor([names.index(item.label) for item in items])
    stack = OnlineStack(config.model, InputConfig(in_channels=1, height=1, width=16, num_classes=2), seed=0)
    stack.calibrate(x[:24])
    readout, detector = OnlineReadout(8, config.readout), NoveltyDetector(8, config.novelty)
    for start in range(0, 120, 8):
        part, known = x[start : start + 8], labels[start : start + 8]
        encoded = stack.encode(part)
        scores, novelty = readout.scores(encoded.features), detector.score(encoded.features)
        if start >= 24:
            assert scores is not None
            answers = found[start : start + 8]
            assert [list(answer.scores.values()) for answer in answers] == scores.tolist()
            assert [answer.label for answer in answers] == [names[index] for index in scores.argmax(dim=1)]
            assert [answer.novelty for answer in answers] == novelty.tolist()
            assert all(torch.equal(answers[row].features, encoded.features[row]) for row in range(8))
        weights = detector.weights(novelty)
        stack.learn(encoded, known, weights)
        readout.learn(encoded.features, known, weights)
        detector.learn(encoded.features, novelty)


def test_prequential_accuracy_counts_late_labels_by_the_first_answer() -> None:
    items = waves(160, labelled=0.3)
    ended = items[: len(items) // 8 * 8]  # of batches that have ended
    truth = {item.id: item.label for item in ended if isinstance(item, Record | LateLabel) and item.label is not None}
    outcomes = applied(small(candidates=TWO), items)
    answers = {answer.id: answer.label for outcome in outcomes for answer in outcome.answers}
    judged = [name for name, label in answers.items() if label is not None and name in truth]
    mains = [outcome.metrics.candidates["main"] for outcome in outcomes]
    assert len(judged) > 100
    assert sum(one.answered for one in mains) == len(judged)
    assert sum(one.right for one in mains) == sum(answers[name] == truth[name] for name in judged)


@given(cut=st.integers(1, 12), labelled=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=4, deadline=None)
def test_restored_at_any_batch_it_goes_on_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, cut: int, labelled: float
) -> None:
    folder = tmp_path_factory.mktemp("snapshots")
    config = small(candidates=TWO, readout={"reservoir": 20}, recompute_every=3, rate={"kind": "after_drift"})
    whole, part = StreamState(config), StreamState(config)
    for number, entry in enumerate(entries(waves(110, labelled=labelled), 8)):
        batch = whole.take(number, entry)
        again = part.take(number, entry)
        if batch is None or again is None:
            continue
        one, other = whole.pipeline.apply(batch), part.pipeline.apply(again)
        assert one == other
        if batch.number == cut:
            snapshot = snapshots.load(snapshots.save(folder, whole.snapshot("s")))
            part = StreamState(config)
            part.restore(snapshot)
    assert whole.snapshot("s").digest == part.snapshot("s").digest


def samples(count: int, length: int, *, group: str = "", start: float = 0.0) -> list[Item]:
    """Blocks of samples of one signal."""
    values = np.random.default_rng(1).standard_normal((count * length, 2))
    return [
        Record(f"{group}{n}", start + n * length, values[n * length : (n + 1) * length], "a", group)
        for n in range(count)
    ]


def machines(seed: int) -> list[Item]:
    """Blocks of samples of two machines: gaps, missing values, times that go back, recordings that begin, labels
    before and after their records."""
    draw, clock, items = np.random.default_rng(seed), {"m": 0.0, "n": 0.0}, list[Item]()
    for number in range(60):
        group, length, kind = "mn"[draw.integers(2)], int(draw.choice([1, 3, 9])), int(draw.integers(2))
        values = np.sin((1 + 2 * kind) * np.arange(length) + 6 * draw.random())[:, None]
        values[draw.integers(length)] = draw.choice([np.nan, 0.5], p=[0.2, 0.8])
        clock[group] += draw.choice([0.0, 7.0, -3.0], p=[0.8, 0.1, 0.1])
        label = "ab"[kind] if draw.random() < 0.4 else None
        items.append(Record(f"r{number}", float(clock[group]), values, label, group, draw.random() < 0.05))
        if label is None:
            items.append(LateLabel(f"r{max(0, number + draw.integers(-6, 3))}", "ab"[kind]))
        clock[group] += length
    return items


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_restarted_after_every_batch_samples_are_cut_and_labelled_alike(tmp_path: Path, seed: int) -> None:
    """Batches of one item, or a few."""
    data = {"window": 8, "hop": 3, "period": 1.0, "missing": "hold", "hold_samples": 2, "calibrate": 5}
    config = small(data=data, labels={"horizon": 8, "ids": 9}, readout={"forgetting": 0.95})
    whole, part = StreamState(config), StreamState(config)
    outcomes = []
    for number, entry in enumerate(entries(machines(seed), 1 + 2 * seed)):
        batch, again = whole.take(number, entry), part.take(number, entry)
        if batch is not None and again is not None:
            outcomes.append(whole.pipeline.apply(batch))
            assert repr(part.pipeline.apply(again)) == repr(outcomes[-1])  # NaN is NaN there
            snapshot = snapshots.load(snapshots.save(tmp_path, part.snapshot("s")))
            part = StreamState(config)
            part.restore(snapshot)
            assert part.snapshot("s").digest == whole.snapshot("s").digest
    assert sum(outcome.metrics.windows for outcome in outcomes) > 20
    assert sum(outcome.metrics.late for outcome in outcomes) > 0
    assert sum(outcome.metrics.unused for outcome in outcomes) > 0
    assert sum(outcome.metrics.faults for outcome in outcomes) > 0


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_samples_are_cut_as_they_come(length: int) -> None:
    """In blocks of any length: the windows of the whole signal, with the record in which each ends."""
    items = samples(80 // length, length, group="m")
    config = small(data={"window": 16, "hop": 8, "calibrate": 1000, "period": 1.0})
    answers = [answer for outcome in applied(config, items, batch=1) for answer in outcome.answers]
    ends = range(15, 80 // length * length, 8)
    assert [answer.id for answer in answers] == [f"m{end // length}" for end in ends]
    assert [answer.window for answer in answers] == list(range(1, len(ends) + 1))
    assert {answer.note for answer in answers} == {f"calibrating: {n} of 1000 windows" for n in batch_totals(answers)}


def test_labels_that_came_are_counted_beside_those_of_windows() -> None:
    """A window has the label of the record in which it ends: of samples 15, 31, 47 and 63."""
    values = np.random.default_rng(1).standard_normal((64, 1, 1))
    items: list[Item] = [
        Record(f"s{n}", float(n), values[n], "a" if n in (10, 15, 40) else None, "m") for n in range(64)
    ]
    config = small(data={"window": 16, "hop": 16, "calibrate": 1000, "period": 1.0})
    late = [LateLabel("s31", "a"), LateLabel("s20", "b")]
    metrics = [outcome.metrics for outcome in applied(config, [*items, *late], batch=6)]
    totals = [sum(getattr(each, key) for each in metrics) for key in ("came", "labels", "late", "unused")]
    assert totals == [5, 2, 1, 0]


def batch_totals(answers: Sequence[Any]) -> set[int]:
    """Windows that had come by the end of each record's batch."""
    return {max(each.window for each in answers if each.id == one.id) for one in answers}


def reasons(config: StreamConfig, items: Sequence[Item]) -> list[tuple[str, str]]:
    """Ids and reasons of what is set aside."""
    outcomes = applied(config, items, batch=1)
    assert sum(outcome.metrics.faults for outcome in outcomes) == sum(len(outcome.set_aside) for outcome in outcomes)
    return [(one.id, one.reason) for outcome in outcomes for one in outcome.set_aside]


def test_bad_records_are_set_aside_with_the_reason() -> None:
    good = Record("g", 5.0, np.ones((4, 2)), "a", "m")
    config = small(data={"window": 4, "hop": 4, "calibrate": 1000}, model=SHORT)
    items = [
        good,
        replace(good, id="schema", values=np.ones((4, 3))),
        replace(good, id="clock", time=4.0),
        replace(good, id="same", time=5.0),
        replace(good, id="begins", time=0.0, begins=True),
        replace(good, id="image", values=np.zeros((1, 8, 8), np.uint8)),
        Fault("expected JSON", b"{", "log.jsonl, line 3"),
    ]
    assert reasons(config, items) == [
        ("schema", "values: expected channels of 2 as before, got 3"),
        ("clock", "time: expected at least 5.0, of the record before, got 4.0"),
        ("image", "values: expected samples to cut windows from, got an image of 1 × 8 × 8"),
        ("", "expected JSON"),
    ]


@pytest.mark.parametrize("values", [np.ones((3, 1)), np.zeros((1, 2, 2), np.uint8)])
def test_a_first_record_of_a_wrong_shape_is_set_aside(values: np.ndarray[Any, Any]) -> None:
    """The shape of all is that of the first one which the model fits."""
    items = [item for item in waves(60) if isinstance(item, Record)]
    config = small(candidates={"main": [], "wide": ["model.layers.0.kernel_size=[1,4]"]})
    [first, *others] = applied(config, [replace(items[0], values=values), *items[1:]], batch=1)
    [aside] = first.set_aside
    shape = " × ".join(map(str, values.shape))
    assert aside.reason.startswith(f"values: expected a shape that the model fits, got {shape}: model.layers.0.kernel")
    assert [outcome.metrics.windows for outcome in others] == [1] * 59


def test_windows_and_images_keep_their_shape() -> None:
    window = Record("w", 0.0, np.ones((16, 1)), "a")
    nan = np.full((16, 1), np.nan)
    items = [window, replace(window, id="short", values=np.ones((15, 1))), replace(window, id="nan", values=nan)]
    assert reasons(small(), items) == [
        ("short", "values: expected a window [samples, channels] of 16 × 1 as before, got 15 × 1"),
        ("nan", "values: expected finite numbers in a record that is a window, got others"),
    ]
    config = small(data={"window_scale": "none"})
    assert reasons(config, [replace(window, values=np.full((16, 1), 1e39))]) == [
        ("w", "values: expected at most 1e+12 in a window, got more")
    ]


@pytest.mark.parametrize("size", [1e11, 1e13, 1e20, 1e38])
def test_no_record_ends_the_stream(size: float) -> None:
    """Values that overflow in float32 once they are multiplied, at the start and later, one in three: they are set
    aside, and the others are learnt from. All windows after the first that have no limit are learnt from."""
    items = [item for item in waves(90) if isinstance(item, Record)]
    wild = [replace(item, values=size * item.values) if n % 3 == 0 else item for n, item in enumerate(items)]
    outcomes = applied(small(data={"calibrate": 20, "window_scale": "none"}), wild)
    aside = sum(outcome.metrics.faults for outcome in outcomes)
    assert aside == (0 if size < 1e12 else len(wild[:88:3]))
    assert outcomes[-1].metrics.candidates["main"].answered == outcomes[-1].metrics.windows


def test_the_first_windows_may_be_too_large() -> None:
    values = np.concatenate([np.ones(16), np.full(16, 1e39), np.sin(np.arange(96))])[:, None]
    items = [Record(f"r{n}", 128.0 * n, values if n == 0 else values[32:], "a") for n in range(6)]
    config = small(data={"window": 16, "hop": 16, "calibrate": 1, "window_scale": "none"})
    outcomes = applied(config, items, batch=1)
    assert [outcome.metrics.windows for outcome in outcomes] == [1, 6, 6, 6, 6, 6]
    assert outcomes[0].metrics.faults == 1


@pytest.mark.parametrize("candidates", [{"main": []}, TWO])
def test_windows_that_are_all_alike_calibrate_nothing(candidates: dict[str, list[str]]) -> None:
    """Of a sensor that is off at first."""
    items = [item for item in waves(120) if isinstance(item, Record)]
    off = [replace(item, values=np.ones((16, 1))) if n < 50 else item for n, item in enumerate(items)]
    config = small(candidates=candidates)
    outcomes = applied(config, off)
    assert [event.kind for outcome in outcomes[:6] for event in outcome.events] == ["class", "class"]
    assert [event.kind for event in outcomes[8].events] == ["calibrated"]  # of 24 windows from the 49th on
    assert outcomes[-1].metrics.candidates["main"].answered == 8
    assert all(outcome.metrics.faults == 0 for outcome in outcomes)


def test_a_model_that_is_guided_by_labels_waits_for_the_first() -> None:
    items = [item for item in waves(90) if isinstance(item, Record)]
    late = [replace(item, label=None) if n < 40 else item for n, item in enumerate(items)]
    layer = small().model.layers[0].model_dump(mode="json") | {"supervised": True, "label_gain": 0.5}
    config = small(model={"layers": [layer]})
    outcomes = applied(config, late)
    assert [event.kind for outcome in outcomes for event in outcome.events][:3] == ["class", "class", "calibrated"]
    assert outcomes[-1].metrics.candidates["main"].answered == 8


def test_an_unknown_class_is_new_or_set_aside() -> None:
    items = [Record("r", 0.0, np.ones((16, 1)), "a"), Record("s", 1.0, np.ones((16, 1))), LateLabel("s", "b")]
    [_, outcome, last] = applied(small(), items, batch=1)
    assert [event.text for event in last.events] == ["new class 'b'"]
    assert (outcome.metrics.classes, last.metrics.classes) == (1, 2)
    config = small(data={"classes": ["a"], "new_classes": "set_aside"})
    assert reasons(config, items) == [("s", "label: expected one of a, got 'b'")]
    config = small(data={"most_classes": 1})
    assert reasons(config, items) == [("s", "label: expected at most data.most_classes=1, got 'b' as well")]


def test_too_many_groups_are_set_aside() -> None:
    config = small(data={"window": 4, "most_groups": 1}, model=SHORT)
    items = [Record(name, 0.0, np.ones((4, 1)), None, name) for name in ("m", "n", "m2")]
    assert [name for name, _ in reasons(config, items)] == ["n", "m2"]


def test_a_label_may_come_before_its_record() -> None:
    record = Record("r", 0.0, np.ones((16, 1)))
    [_, outcome] = applied(small(), [LateLabel("r", "a"), record], batch=1)
    assert (outcome.metrics.labels, outcome.metrics.late, outcome.metrics.unused) == (1, 0, 0)


def test_labels_beyond_the_horizon_are_not_used() -> None:
    config = small(labels={"horizon": 3})
    records = [Record(f"r{n}", float(n), np.ones((16, 1))) for n in range(5)]
    outcomes = applied(config, [*records, LateLabel("r0", "a"), LateLabel("r1", "a")], batch=1)
    assert [outcome.metrics.late for outcome in outcomes[5:]] == [0, 1]
    more = [Record(f"s{n}", 9.0, np.ones((16, 1))) for n in range(5)]
    outcomes = applied(config, [*records, LateLabel("r0", "a"), *more], batch=1)
    assert sum(outcome.metrics.unused for outcome in outcomes) == 1


def test_a_better_challenger_becomes_the_champion() -> None:
    """The champion's features are those of a layer that hardly learns and sees one sample in 16."""
    draw = np.random.default_rng(0)
    items: list[Item] = []
    for number in range(600):
        kind = int(draw.integers(2))
        wave = np.sin((1 + 0.4 * kind) * np.arange(16) + 6 * draw.random()) + 0.1 * draw.standard_normal(16)
        items.append(Record(f"r{number}", float(number), wave[:, None], "ab"[kind]))
    poor = ["model.layers.0.out_channels=1", "model.layers.0.kernel_size=[1,1]", "model.layers.0.stride=[1,1]"]
    config = small(candidates={"poor": poor, "main": []}, champion="poor")
    outcomes = applied(config, items)
    events = [event for outcome in outcomes for event in outcome.events if event.kind == "champion"]
    assert len(events) == 1
    assert (events[0].fields["before"], events[0].fields["after"]) == ("poor", "main")
    switched = next(index for index, outcome in enumerate(outcomes) if events[0] in outcome.events)
    assert {answer.candidate for answer in outcomes[switched].answers} == {"poor"}
    assert {answer.candidate for answer in outcomes[switched + 1].answers} == {"main"}
    indices = [event.index for outcome in outcomes for event in outcome.events]
    assert indices == list(range(len(indices)))


def test_images_are_learnt_from() -> None:
    draw = np.random.default_rng(0)
    items: list[Item] = []
    for number in range(80):
        image = draw.integers(0, 60, (1, 8, 8)).astype(np.uint8)
        kind = number % 2
        image[:, :, 4 * kind : 4 * kind + 4] += 150
        items.append(Record(f"r{number}", float(number), image, "ab"[kind] if number % 3 else None))
    layer = {"out_channels": 8, "kernel_size": 3, "pool": 2}
    outcomes = applied(small(model={"layers": [layer]}), items)
    main = [outcome.metrics.candidates["main"] for outcome in outcomes]
    assert sum(one.right for one in main) == sum(one.answered for one in main) > 30
