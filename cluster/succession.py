"""What follows a group that has ended: policies with the counts and times that they decide by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from cluster.config import RunConfig
from cluster.policy import Decision, Failure, FailurePolicy, Growth, GrowthPolicy, Restart
from cluster.summary import RunRecord
from cluster.text import count


class Succession:
    """Of one run.

    Parameters
    ----------
    record: counts new groups by their cause, over the whole run.
    clock: seconds, never going back.

    Attributes
    ----------
    generation: number of groups before the present one.
    growing: whether the group is larger than the one before it, and has not learnt yet.
    """

    def __init__(self, config: RunConfig, record: RunRecord, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        limits = config.cluster
        self._policy = FailurePolicy(
            limits.max_restarts, limits.max_preemptions, limits.min_shards, limits.backoff_s, config.divergence
        )
        self._growth = GrowthPolicy(config.mesh.world_size, limits.grow_after_s)
        self._record = record
        self._in_a_row = {"restarts": 0, "preemptions": 0}
        self._smaller: int | None = None
        self.generation = 0

    @property
    def growing(self) -> bool:
        return self._smaller is not None

    def missing(self, shards: int) -> int:
        """Ranks that a group of `shards` lacks."""
        return self._growth.full - shards

    def larger(self, shards: int, room: int, *, saved: bool) -> Growth | None:
        """A larger group that should replace one of `shards` now, see `GrowthPolicy`; to be asked in every round."""
        larger = self._growth.decide(self._clock(), shards, room, saved=saved)
        return None if larger is None else Growth(f"there is room for {count(larger, 'rank')} again", larger)

    def after(self, outcome: Failure | Growth, shards: int, room: int) -> Decision:
        """What follows a group of `shards`, where there is room for so many ranks more."""
        now_s = self._clock()
        if isinstance(outcome, Growth):
            return Restart(outcome.shards, 0.0)
        if self._smaller is not None and not outcome.diverged:
            self._growth.tried(now_s, came_up=False)
            return Restart(self._smaller, 0.0)
        in_a_row = self._in_a_row["preemptions" if outcome.preempted else "restarts"]
        decision = self._policy.decide(outcome, in_a_row, shards, lowered=self._record.rate < 1)
        larger = self._growth.at_a_restart(now_s, shards, room)
        if isinstance(decision, Restart) and decision.shards == shards and larger is not None:
            return replace(decision, shards=larger)
        return decision

    def count(self, decision: Restart, outcome: Failure | Growth, shards: int) -> dict[str, str]:
        """Count the group that follows one of `shards`. Returns what has changed, for the run's tags."""
        self.generation += 1
        tags = {}
        if isinstance(outcome, Failure) and outcome.preempted:
            self._record.preemptions += 1
            self._in_a_row["preemptions"] += 1
            tags = {"preemptions": str(self._record.preemptions)}
        elif isinstance(outcome, Failure) and not self.growing:  # a larger group that does not come up costs nothing
            self._record.restarts += 1
            self._in_a_row["restarts"] += 1
            tags = {"restarts": str(self._record.restarts)}
        self._smaller = shards if decision.shards > shards else None
        return tags

    def saved(self) -> None:
        """A new checkpoint earns new restarts."""
        self._in_a_row = dict.fromkeys(self._in_a_row, 0)

    def learns(self) -> dict[str, str]:
        """A larger group learns: it has come up. Returns what has changed, for the run's tags."""
        self._smaller = None
        self._growth.tried(self._clock(), came_up=True)
        self._record.growths += 1
        return {"growths": str(self._record.growths)}
