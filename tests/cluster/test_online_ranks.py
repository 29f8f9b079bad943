"""What a driver does when ranks of its stream are lost, at every moment; the group is one rank in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cluster.online
from cluster.config import GroupConfig
from cluster.mesh import MeshConfig
from cluster.online import RankedStack
from cluster.online_group import Call
from cluster.policy import Failure, GroupFailure, RanksLostError
from simmatch.config import ConfigError, parse
from simmatch.online.stack import OnlineStack
from simmatch.online.state import digest
from tests.cluster.stream_groups import FATAL, LOST, TAKEN, Groups, groups_here
from tests.cluster.test_online import MODEL, OPTIONS, SOURCE, batches, stream
from tests.jobs.streaming.streams import wait_until


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_here() as groups:
        yield groups
        assert groups.alive == 0


@pytest.fixture
def make(groups: Groups) -> Iterator[Callable[..., RankedStack]]:
    made: list[RankedStack] = []

    def make(*, notes: list[str] | None = None, mesh: MeshConfig | None = None, **limits: Any) -> RankedStack:
        cluster = parse(GroupConfig, {"backoff_s": 1e-3, **limits})
        note = [].append if notes is None else notes.append
        made.append(RankedStack(MODEL, SOURCE, mesh=mesh or MeshConfig(), cluster=cluster, note=note, **OPTIONS))
        return made[-1]

    yield make
    for stack in made:
        stack.close()


@pytest.fixture(scope="module")
def alone() -> tuple[list[str], str]:
    """What one process says of the stream, and its state at the end."""
    stack = OnlineStack(MODEL, SOURCE, **OPTIONS)
    said = stream(stack)
    return said, digest(stack.state())


CALLS = ("calibrate", "encode", "learn", "learn_labels", "grow", "raise_rate", "state", "restore")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_ranks_that_are_lost_at_any_call_are_replaced_to_the_same_bits(
    groups: Groups, make: Callable[..., RankedStack], alone: tuple[list[str], str], name: str, moment: str, times: int
) -> None:
    """The second call of this name fails, before ranks have done it or when they have; the new ranks' next one, too.

    The calls of `restore` are those of new ranks, so the learning of batch 6 fails first.
    """
    seen, lost = 0, 0

    def fault(_: int, call: Call) -> BaseException | None:
        nonlocal seen, lost
        if name == "restore" and call.name == "learn" and groups.calls.count("learn") == 7 and lost == 0:
            return LOST
        seen += call.name == name
        if call.name == name and lost < times and seen >= (2 if name in ("encode", "learn") else 1):
            lost += 1
            return LOST
        return None

    setattr(groups, moment, fault)
    stack = make()
    said = stream(stack)
    assert lost == times
    assert (said, digest(stack.state())) == alone
    assert stack.generation == times + (name == "restore")
    assert groups.alive == 1


def test_the_limits_are_those_of_training(groups: Groups, make: Callable[..., RankedStack]) -> None:
    """Restarts and preemptions count for themselves; a new state earns new ones."""
    notes: list[str] = []
    stack = make(notes=notes, max_restarts=1, max_preemptions=2)
    x, labels, _ = batches()[0]
    stack.calibrate(x)
    plan = [TAKEN, LOST, TAKEN]
    groups.before = lambda number, call: plan.pop(0) if plan and call.name == "encode" else None
    stack.learn(stack.encode(x), labels)
    assert stack.generation == 3
    assert notes[0] == "rank 1 was lost; its node was drained; starting 1 new rank from the beginning, 1 call to repeat"
    stack.state()
    plan += [LOST]
    stack.encode(x)
    plan += [LOST]
    with pytest.raises(RanksLostError, match=r"rank 1 was lost; cluster.max_restarts=1 without a new checkpoint"):
        stack.encode(x)
    assert notes[-1].endswith("starting 1 new rank from the newest state, 0 calls to repeat")


def test_a_group_may_shrink_where_there_is_no_room(
    groups: Groups, make: Callable[..., RankedStack], alone: tuple[list[str], str]
) -> None:
    """Two of three ranks are left, whatever the number of restarts; with exact sums to the same bits."""
    notes: list[str] = []
    no_room = GroupFailure(Failure("no room for 3 ranks", retryable=True, fits=2))
    stack = make(notes=notes, mesh=MeshConfig(channel=3), min_shards=2, max_restarts=1)
    groups.before = lambda number, call: LOST if call.name == "learn" and groups.alive and number == 8 else None
    groups.start = lambda generation: no_room if generation == 1 else None
    assert stream(stack) == alone[0]
    assert digest(stack.state()) == alone[1]
    assert [note.partition("; ")[2] for note in notes] == [
        "starting 3 new ranks from the beginning, 4 calls to repeat",
        "starting 2 new ranks from the beginning, 4 calls to repeat",
    ]


ENDS: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "would happen again": (FATAL, RanksLostError, "rank 0 failed: no such thing"),
    "a signal": (KeyboardInterrupt("ended by SIGINT"), KeyboardInterrupt, "ended by SIGINT"),
    "a cluster too small": (ConfigError("mesh: expected more"), ConfigError, "mesh: expected more"),
}


@pytest.mark.parametrize("place", ["start", "before", "after"])
@pytest.mark.parametrize(("error", "raised", "message"), ENDS.values(), ids=ENDS)
def test_an_end_is_an_end(
    groups: Groups,
    make: Callable[..., RankedStack],
    error: BaseException,
    raised: type[BaseException],
    message: str,
    place: str,
) -> None:
    """No group is left, none is started any more, and no call waits."""
    stack = make()
    x, _, _ = batches()[0]
    if place != "start":
        stack.calibrate(x)
    setattr(groups, place, lambda *_: error)
    with pytest.raises(raised, match=message):
        stack.calibrate(x) if place == "start" else stack.encode(x)
    assert groups.alive == 0
    setattr(groups, place, lambda *_: None)
    calls = len(groups.calls)
    for call in (stack.state, stack.export, stack.raise_rate):
        with pytest.raises(RanksLostError, match=message):
            call()
    assert (groups.alive, len(groups.calls)) == (0, calls)


def test_a_closed_stack_starts_nothing(groups: Groups, make: Callable[..., RankedStack]) -> None:
    before = threading.active_count()
    stack = make()
    x, _, _ = batches()[0]
    stack.calibrate(x)
    stack.close()
    stack.close()
    assert (groups.alive, threading.active_count()) == (0, before)
    with pytest.raises(RanksLostError, match="closed"):
        stack.encode(x)


def test_what_a_sign_of_life_finds_is_for_the_next_call(groups: Groups, make: Callable[..., RankedStack]) -> None:
    """Ranks are replaced at once, instead of being waited for; a cluster without its head ends the stream."""
    found: list[BaseException] = []
    groups.poll = lambda: found[-1] if found else None
    stack = make(heartbeat_s=0.02)
    x, _, _ = batches()[0]
    stack.calibrate(x)
    found.append(LOST)
    wait_until(lambda: stack._failure is not None, 10.0)
    found.clear()
    calls = len(groups.calls)
    stack.encode(x)
    assert (stack.generation, groups.calls[calls:]) == (1, ["calibrate", "encode"])
    found.append(OSError("Ray is gone"))
    wait_until(lambda: stack._failure is not None, 10.0)
    with pytest.raises(RanksLostError, match="Ray is gone"):
        stack.encode(x)


def test_a_driver_keeps_few_calls_and_asks_for_no_state_that_it_has(
    groups: Groups, make: Callable[..., RankedStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing but labels comes; what is told of a state later is not changed by who has it."""
    monkeypatch.setattr(cluster.online, "STATE_EVERY", 5)
    stack = make()
    x, labels, _ = batches()[0]
    stack.calibrate(x)
    for _ in range(12):
        stack.learn_labels(stack.encode(x), labels)
        assert len(stack._since) < 5
    state, asked = stack.state(), groups.calls.count("state")
    for tensor in state.values():
        tensor.zero_()
    assert digest(stack.state()) != digest(state)
    assert groups.calls.count("state") == asked
    assert stack._reply.tensors == {}  # the memory of Ray is not held
    stack.close()
    assert stack.state().keys() == state.keys()


def test_memory_may_be_used_again_after_a_call(groups: Groups, make: Callable[..., RankedStack]) -> None:
    """A buffer that every batch is read into."""
    alone, stack = OnlineStack(MODEL, SOURCE, **OPTIONS), make()
    buffers = [torch.empty_like(tensor) for tensor in batches()[0]]
    groups.before = lambda number, call: LOST if number == 6 else None  # the third batch is to be encoded
    for learner in (alone, stack):
        for number, batch in enumerate(batches()[:4]):
            for buffer, tensor in zip(buffers, batch, strict=True):
                buffer.copy_(tensor)
            x, labels, weights = buffers
            if number == 0:
                learner.calibrate(x)
            learner.learn(learner.encode(x), labels, weights)
    assert stack.generation == 1
    assert digest(stack.state()) == digest(alone.state())


def test_batches_that_were_encoded_before_others_are_learnt(make: Callable[..., RankedStack]) -> None:
    """What one process makes of them."""
    states = []
    for stack in (OnlineStack(MODEL, SOURCE, **OPTIONS), make()):
        (x, labels, _), (y, others, _) = batches()[:2]
        stack.calibrate(x)
        first, second = stack.encode(x), stack.encode(y)
        stack.learn(second, others)
        stack.learn(first, labels)
        stack.learn_labels(second, others)
        states.append(digest(stack.state()))
    assert len(set(states)) == 1


def test_bad_arguments_cost_no_ranks(groups: Groups, make: Callable[..., RankedStack]) -> None:
    stack = make()
    x, labels, weights = batches()[0]
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 1, 40\], got \[2, 1, 1, 3\]"):
        stack.calibrate(torch.zeros(2, 1, 1, 3))
    stack.calibrate(x)
    encoded = stack.encode(x)
    calls = len(groups.calls)
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 1, 40\], got \[0, 1, 1, 40\]"):
        stack.encode(x[:0])
    with pytest.raises(ValueError, match=r"x: expected uint8 or floating-point records, got torch\.int64"):
        stack.encode(x.long())
    with pytest.raises(ValueError, match="labels: expected classes 0 … 1 or -1, got 9"):
        stack.learn(encoded, torch.full_like(labels, 9))
    with pytest.raises(ValueError, match="labels: expected a tensor of integers"):
        stack.learn_labels(encoded, labels[:3])
    with pytest.raises(ValueError, match="weights: expected numbers from 0 to 1, got 2"):
        stack.learn(encoded, labels, torch.full((15,), 2.0))
    stack.learn(encoded, labels, torch.zeros(15))  # nothing to learn
    assert (len(groups.calls), groups.alive) == (calls, 1)
    stack.learn(encoded, labels, weights)


def test_seconds_are_those_of_the_ranks(make: Callable[..., RankedStack]) -> None:
    stack = make()
    stack.calibrate(batches()[0][0])
    before = stack.seconds
    assert before > 0
    stack.encode(batches()[0][0])
    assert stack.seconds > before
