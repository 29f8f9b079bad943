"""A group of a stream's ranks that is one rank in this process, and fails where a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import cluster.online
from cluster.online_group import Call
from cluster.online_rank import OnlineRank, Reply, StreamAssignment
from cluster.policy import Failure, GroupFailure

LOST = GroupFailure(Failure("rank 1 was lost", retryable=True))
TAKEN = GroupFailure(Failure("rank 1 was lost; its node was drained", retryable=True, preempted=True))
FATAL = GroupFailure(Failure("rank 0 failed: no such thing", retryable=False))

Faults = Callable[[int, Call], BaseException | None]
"""(number of the call, from 0, of all groups together, call) → what it raises."""


class Groups:
    """Stands in for `StreamGroup`: makes groups, and keeps a record of what they are called.

    Attributes
    ----------
    before, after: what a call raises before ranks have done anything, and when they have done it.
    start: what the start of the group of a generation raises.
    poll: what a sign of life raises.
    calls: names of all calls; alive: groups that have started and not ended.
    """

    def __init__(self) -> None:
        self.before: Faults = lambda number, call: None
        self.after: Faults = lambda number, call: None
        self.start: Callable[[int], BaseException | None] = lambda generation: None
        self.poll: Callable[[], BaseException | None] = lambda: None
        self.calls: list[str] = []
        self.alive = 0

    def __call__(self, assignment: StreamAssignment, worker_class: type[OnlineRank], *, grows: bool) -> Group:
        return Group(self, worker_class(assignment))


class Group:
    """One of them."""

    def __init__(self, groups: Groups, rank: OnlineRank) -> None:
        self._groups, self._rank = groups, rank
        self._lives = False

    def start(self, note: Callable[[str], None]) -> None:
        self._lives = True
        self._groups.alive += 1
        _raise(self._groups.start(self._rank.assignment.generation))
        self._rank.begin(1)

    def perform(self, call: Call) -> Reply:
        assert self._lives
        number = len(self._groups.calls)
        self._groups.calls.append(call.name)
        _raise(self._groups.before(number, call))
        reply = self._rank.perform(call.name, dict(call.options), call.header, call.arrays)
        assert isinstance(reply, Reply)
        _raise(self._groups.after(number, call))
        return reply

    def poll(self) -> list[Any]:
        _raise(self._groups.poll())
        return []

    def end(self) -> None:
        assert self._lives
        self._lives = False
        self._groups.alive -= 1


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


@contextmanager
def groups_here() -> Iterator[Groups]:
    """Stacks on ranks, made in here, have their rank in this process."""
    groups = Groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.online, "StreamGroup", groups)
        yield groups
