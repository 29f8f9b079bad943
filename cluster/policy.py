"""What to do when ranks fail: a policy returns decisions, the controller carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["stop", "lower_rate"]

RATE_FACTOR_AFTER_DIVERGENCE = 0.5
"""Rates of a run that has diverged, over those before."""

LONGEST_PAUSE_S = 60.0
"""Between two attempts, however many there were."""


@dataclass(frozen=True)
class Restart:
    """Replace the whole group, after a pause, and continue from the newest checkpoint.

    Attributes
    ----------
    shards: of the new group; fewer than before where no more fit.
    lower_rate: learn at `RATE_FACTOR_AFTER_DIVERGENCE` of the rates so far.
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
    retryable: a rank died, hung or was cut off, through no fault of the program: a new group may fare better.
    fits: ranks that the cluster has room for, where it has none for all of them.
    diverged: numbers stopped being numbers, or exploded; the same rates would lead there again.
    """

    message: str
    retryable: bool
    fits: int | None = None
    diverged: bool = False


@dataclass(frozen=True)
class FailurePolicy:
    """Restart after a lost rank; stop on anything that would happen again.

    Attributes
    ----------
    max_restarts: attempts in a row that end without a new checkpoint.
    min_shards: smallest group that a run may shrink to where no more ranks fit; None: it never shrinks.
    backoff_s: pause before the second attempt in a row, twice as long before each further one; none before the first.
    divergence: whether a run whose numbers diverge ends, or goes back to the newest checkpoint, once, and on at lower
        rates.
    """

    max_restarts: int
    min_shards: int | None = None
    backoff_s: float = 1.0
    divergence: Divergence = "stop"

    def decide(self, failure: Failure, failed_restarts: int, shards: int, *, lowered: bool = False) -> Decision:
        """What to do after `failed_restarts` restarts without a new checkpoint, in a group of `shards`.

        lowered: the rates have been lowered before.
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
