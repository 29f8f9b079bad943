"""What to do when a group fails: the policy returns a decision, the controller carries it out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Divergence = Literal["stop", "lower_rate"]

RATE_FACTOR_AFTER_DIVERGENCE = 0.5
"""Learning rates after a divergence, over those before."""

LONGEST_PAUSE_S = 60.0
"""Longest pause between two attempts."""


@dataclass(frozen=True)
class Restart:
    """Replace the whole group, after a pause, and continue from the newest checkpoint.

    Attributes
    ----------
    shards: of the new group; fewer than before where there is room for no more, more where there is room again.
    lower_rate: multiply the learning rates by `RATE_FACTOR_AFTER_DIVERGENCE`.
    """

    shards: int
    after_s: float
    lower_rate: bool = False


@dataclass(frozen=True)
class Stop:
    """End the run; `why` is for people."""

    why: str


Decision = Restart | Stop


@dataclass(frozen=True)
class Failure:
    """Why a group cannot go on.

    Attributes
    ----------
    message: one line for people, naming the rank.
    retryable: a rank died, hung or was cut off, through no fault of the program: a new group may succeed.
    fits: number of ranks that the cluster has room for, where that was too few.
    diverged: values became NaN or infinite, or exploded; the same learning rates would lead there again.
    secondary: the rank that reports it has lost another one, or has been told of the other's exception.
    preempted: a node was taken away on purpose, or is about to be: nothing has failed.
    """

    message: str
    retryable: bool
    fits: int | None = None
    diverged: bool = False
    secondary: bool = field(default=False, repr=False)
    preempted: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class Growth:
    """There is room for a larger group, of `shards`; `message` is for people."""

    message: str
    shards: int


class GroupFailure(RuntimeError):
    """Raised where a group cannot go on."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


class RanksLostError(RuntimeError):
    """Ranks of a stream were lost and not replaced, or would fail again; the message is for people."""


@dataclass(frozen=True)
class FailurePolicy:
    """Restart after a lost rank; stop on anything that would happen again.

    Attributes
    ----------
    max_restarts: most restarts in a row without a new checkpoint; a group may shrink all the same.
    max_preemptions: the same for nodes that were taken away, which count for themselves; None: any number.
    min_shards: smallest group that a run may shrink to where there is room for no more ranks; None: it never shrinks.
    backoff_s: pause before the second restart in a row, doubled for each further one; none before the first.
    divergence: whether a run that diverges ends, or continues once from the newest checkpoint at lower learning rates.
    """

    max_restarts: int
    max_preemptions: int | None = None
    min_shards: int | None = None
    backoff_s: float = 1.0
    divergence: Divergence = "stop"

    def decide(self, failure: Failure, in_a_row: int, shards: int, *, lowered: bool = False) -> Decision:
        """What to do with a group of `shards`.

        in_a_row: restarts for failures, or for preemptions if this is one, since the newest checkpoint.
        lowered: the learning rates have been lowered before.
        """
        if failure.diverged and self.divergence == "lower_rate" and not lowered:
            return Restart(shards, 0.0, lower_rate=True)
        if not failure.retryable:
            return Stop(failure.message)
        key = "max_preemptions" if failure.preempted else "max_restarts"
        most: int | None = getattr(self, key)
        after_s = min(self.backoff_s * 2 ** (in_a_row - 1), LONGEST_PAUSE_S) if in_a_row else 0.0
        if failure.fits is not None and self.min_shards is not None and failure.fits < shards:
            if failure.fits < self.min_shards:
                return Stop(f"{failure.message}; cluster.min_shards={self.min_shards}")
            return Restart(failure.fits, after_s)  # whatever the limit: what has failed, or been taken, was counted
        if most is not None and in_a_row >= most:
            return Stop(f"{failure.message}; cluster.{key}={most} without a new checkpoint")
        return Restart(shards, after_s)


@dataclass
class GrowthPolicy:
    """When a group that shrank becomes larger again.

    Room for as many more ranks has been there for `after_s` without a change, the group has written a checkpoint, and
    after n larger groups in a row that did not come up, 2ⁿ `after_s` have passed since the last of them. So a run grows
    at most once every `after_s`, and a node that comes and goes never makes it grow.

    >>> policy = GrowthPolicy(full=4, after_s=60.0)
    >>> [policy.decide(now_s, shards=2, room=1, saved=True) for now_s in (0.0, 59.0, 60.0)]
    [None, None, 3]

    Attributes
    ----------
    full: shards of the run's configuration; no group has more.
    after_s: seconds.
    """

    full: int
    after_s: float
    _room: int = 0
    _since_s: float = -math.inf
    _not_up: int = 0
    _tried_s: float = -math.inf

    def decide(self, now_s: float, shards: int, room: int, *, saved: bool) -> int | None:
        """Shards of the larger group that should replace one of `shards` now; None: none.

        now_s: of a clock that never goes back.
        room: ranks that there is room for beside the group's own.
        saved: the group has written a checkpoint.
        """
        if room != self._room:
            self._room, self._since_s = room, now_s
        settled = now_s - self._since_s >= self.after_s
        return self.at_a_restart(now_s, shards, room) if settled and saved else None

    def at_a_restart(self, now_s: float, shards: int, room: int) -> int | None:
        """The same where the group ends anyway: room that has come just now is used."""
        rested = now_s - self._tried_s >= self.after_s * 2.0**self._not_up
        larger = min(self.full, shards + room)
        return larger if larger > shards and (rested or not self._not_up) else None

    def tried(self, now_s: float, *, came_up: bool) -> None:
        """A larger group has come up, or has not."""
        self._tried_s = now_s
        self._not_up = 0 if came_up else self._not_up + 1
        self._room = 0
