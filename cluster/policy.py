"""What to do when a group fails: the policy returns a decision, the controller carries it out."""

from __future__ import annotations

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
    shards: of the new group; fewer than before where there is room for no more.
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
    """

    message: str
    retryable: bool
    fits: int | None = None
    diverged: bool = False
    secondary: bool = field(default=False, repr=False)


class GroupFailure(RuntimeError):
    """Raised where a group cannot go on."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


@dataclass(frozen=True)
class FailurePolicy:
    """Restart after a lost rank; stop on anything that would happen again.

    Attributes
    ----------
    max_restarts: most restarts in a row without a new checkpoint.
    min_shards: smallest group that a run may shrink to where there is room for no more ranks; None: it never shrinks.
    backoff_s: pause before the second restart in a row, doubled for each further one; none before the first.
    divergence: whether a run that diverges ends, or continues once from the newest checkpoint at lower learning rates.
    """

    max_restarts: int
    min_shards: int | None = None
    backoff_s: float = 1.0
    divergence: Divergence = "stop"

    def decide(self, failure: Failure, failed_restarts: int, shards: int, *, lowered: bool = False) -> Decision:
        """What to do after `failed_restarts` restarts without a new checkpoint, with a group of `shards`.

        lowered: the learning rates have been lowered before.
        """
        if failure.diverged and self.divergence == "lower_rate" and not lowered:
            return Restart(shards, 0.0, lower_rate=True)
        if not failure.retryable:
            return Stop(failure.message)
        if failed_restarts >= self.max_restarts:
            limit = f"cluster.max_restarts={self.max_restarts} without a new checkpoint"
            return Stop(f"{failure.message}; {limit}")
        after_s = min(self.backoff_s * 2 ** (failed_restarts - 1), LONGEST_PAUSE_S) if failed_restarts else 0.0
        if failure.fits is None or failure.fits >= shards or self.min_shards is None:
            return Restart(shards, after_s)
        if failure.fits < self.min_shards:
            return Stop(f"{failure.message}; cluster.min_shards={self.min_shards}")
        return Restart(failure.fits, after_s)
