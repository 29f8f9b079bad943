"""A stack of a stream on Ray actors: the bits of one process, also after ranks were lost. A group takes some seconds of
processor time to start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import GroupConfig
from cluster.mesh import MeshConfig
from cluster.online import RankedStack
from cluster.policy import RanksLostError
from simmatch.config import ConfigError, ModelConfig, parse
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.online.rate import RateConfig
from simmatch.online.stack import OnlineStack
from simmatch.online.state import digest
from tests.cluster.actors import assert_gone, embedded_ray, limits, nothing_reserved
from tests.jobs.streaming.streams import wait_until

pytestmark = pytest.mark.slow

CPUS = 4
LAYER = {
    "out_channels": 7,
    "kernel_size": [1, 7],
    "stride": [1, 3],
    "whiten": True,
    "supervised": True,
    "label_gain": 1.0,
    "pool": [1, 4],
    "dynamics": {"exchange": "gather_state"},
}
MODEL = parse(ModelConfig, {"layers": [LAYER]})
SOURCE = InputConfig(in_channels=1, height=1, width=40, num_classes=2)
RATE = RateConfig(kind="after_drift", decay_steps=5)
OPTIONS: dict[str, Any] = {"seed": 3, "rate": RATE, "reduce": "exact"}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """An embedded Ray of this module's own."""
    with embedded_ray(CPUS) as ray:
        yield ray


@contextmanager
def ranked(ray: Any, mesh: MeshConfig, **changes: Any) -> Iterator[tuple[RankedStack, list[str]]]:
    """A stack on ranks, which are gone at the end, and what was noted."""
    notes: list[str] = []
    cluster = parse(GroupConfig, limits(heartbeat_s=10.0, **changes))
    stack = RankedStack(MODEL, SOURCE, mesh=mesh, cluster=cluster, note=notes.append, grows=False, **OPTIONS)
    try:
        yield stack, notes
    finally:
        pids = pids_of(stack)
        stack.close()
        assert_gone(pids)
        nothing_reserved(ray, CPUS)


def pids_of(stack: RankedStack) -> list[int]:
    return [] if stack._group is None else [rank.pid for rank in stack._group.ranks]


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(150, 1, 1, 40, generator=generator)
    labels = torch.randint(UNLABELLED, 2, (150,), generator=generator)
    weights = torch.rand(150, generator=generator)
    return list(zip(x.split(15), labels.split(15), weights.split(15), strict=True))


def stream(
    stack: OnlineStack | RankedStack,
    *,
    kill: dict[int, tuple[int, ...]] | None = None,
    stop: dict[int, tuple[int, ...]] | None = None,
    start: int = 0,
) -> list[str]:
    """Ten batches; a label that comes late, a class, a drift, a state; ranks kill[n] are killed, and ranks stop[n] are
    suspended, once batch n has been encoded. What is said of every batch."""
    said = []
    work = batches()
    if not stack.calibrated:
        stack.calibrate(work[0][0])
    for number, (x, labels, weights) in list(enumerate(work))[start:]:
        encoded = stack.encode(x)
        scores = {} if encoded.label_scores is None else {"scores": encoded.label_scores}
        said.append(digest({"features": encoded.features, **encoded.signals, **scores}))
        for signum, ranks in ((signal.SIGKILL, kill), (signal.SIGSTOP, stop)):
            for rank in (ranks or {}).get(number, ()):
                assert isinstance(stack, RankedStack)
                os.kill(pids_of(stack)[rank], signum)
        stack.learn(encoded, labels, weights if number % 2 else None)
        if number == 3:
            stack.learn_labels(stack.encode(x[:4]), labels[:4])
            stack.grow(3)
        if number == 4:
            stack.state()
            stack.raise_rate()
    return said


LOST: dict[str, tuple[MeshConfig, dict[int, tuple[int, ...]], int]] = {
    "between test and learning": (MeshConfig(channel=2), {6: (1,)}, 1),
    "often": (MeshConfig(channel=2), {0: (0,), 3: (1,), 8: (0, 1)}, 3),
    "replicas": (MeshConfig(data=2), {4: (1,)}, 1),
}
LONG = {"often", "replicas"}


@pytest.mark.parametrize(
    ("mesh", "kill", "generations"),
    [pytest.param(*case, id=name, marks=[pytest.mark.fault] * (name in LONG)) for name, case in LOST.items()],
)
def test_ranks_give_the_bits_of_one_process_whoever_is_lost(
    ray: Any, mesh: MeshConfig, kill: dict[int, tuple[int, ...]], generations: int
) -> None:
    alone = OnlineStack(MODEL, SOURCE, **OPTIONS)
    expected = stream(alone)
    with ranked(ray, mesh) as (stack, notes):
        assert stream(stack, kill=kill) == expected
        assert digest(stack.state()) == digest(alone.state())
        assert (stack.updates, stack.learning_rate) == (alone.updates, alone.learning_rate)
        assert stack.source == alone.source
        assert digest(stack.export().state_dict()) == digest(alone.export().state_dict())
        lost = [note for note in notes if "; starting 2 new ranks from " in note]
        assert len(lost) == stack.generation == generations
        assert all("rank" in note for note in lost)


@pytest.mark.fault
def test_goes_on_from_the_state_of_one_process(ray: Any) -> None:
    """A stream that was learnt by one process, on three ranks."""
    alone = OnlineStack(MODEL, SOURCE, **OPTIONS)
    stream(alone)
    state = alone.state()
    expected = stream(alone, start=7)
    with ranked(ray, MeshConfig(channel=3)) as (stack, _):
        stack.restore(state)
        assert stack.calibrated
        assert stack.source.num_classes == 3
        assert stream(stack, start=7) == expected
        assert digest(stack.state()) == digest(alone.state())


@pytest.mark.fault
def test_what_would_fail_again_ends_it(ray: Any) -> None:
    """Values that are not finite, on all ranks: none is left, and none is started any more."""
    with ranked(ray, MeshConfig(channel=2)) as (stack, _):
        stack.calibrate(batches()[0][0])
        pids = pids_of(stack)
        with pytest.raises(RanksLostError, match="non-finite"):
            stack.encode(torch.full((2, 1, 1, 40), torch.nan))
        assert_gone(pids)
        with pytest.raises(RanksLostError, match="non-finite"):
            stack.state()


@pytest.mark.fault
def test_a_rank_that_hangs_is_replaced(ray: Any) -> None:
    """Between two batches it is noticed within the heartbeat, and during one within the limit on an exchange."""
    alone = OnlineStack(MODEL, SOURCE, **OPTIONS)
    expected = stream(alone)
    with ranked(ray, MeshConfig(channel=2), collective_timeout_s=15.0) as (stack, notes):
        x, _, _ = batches()[0]
        stack.calibrate(x)
        os.kill(pids_of(stack)[1], signal.SIGSTOP)
        wait_until(lambda: stack._failure is not None, 60.0)
        assert stream(stack, stop={3: (1,)}) == expected
        assert digest(stack.state()) == digest(alone.state())
        assert "rank 1" in notes[0]
        assert "did not answer within 10 s" in notes[0]
        assert "within 900 s" not in notes[1]


def test_what_a_stream_refuses() -> None:
    with pytest.raises(ConfigError, match=r"mesh.layer: expected 1 for a stream, got 2"):
        RankedStack(MODEL, SOURCE, mesh=MeshConfig(layer=2))
    with pytest.raises(ConfigError, match=r"mesh.channel: expected at most 7"):
        RankedStack(MODEL, SOURCE, mesh=MeshConfig(channel=8))
