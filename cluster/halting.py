"""Why the ranks of a group are asked for a last checkpoint: the run is to end, a node is to go, a larger group fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.departures import departures
from cluster.policy import Failure, Growth

if TYPE_CHECKING:
    from cluster.group import WorkerGroup  # imports ray, whose environment must be set by then


@dataclass(frozen=True)
class Halt:
    """A reason to ask for a checkpoint, after which the group ends.

    Attributes
    ----------
    message: for people.
    then: why there is a next group; None: the run ends.
    limit_s: longest wait for the checkpoint.
    """

    message: str
    then: Failure | Growth | None = None
    limit_s: float = math.inf

    def outranks(self, other: Halt | None) -> bool:
        """Whether this one is in force where both are given: the end of the run, then a node that goes."""
        order = (Growth, Failure, type(None))
        return other is None or order.index(type(self.then)) > order.index(type(other.then))


class Halting:
    """Of one group.

    Parameters
    ----------
    grace_s: longest wait for the last checkpoint of a run that is to end.
    note: told what is waited for, and every node that is to go.

    Attributes
    ----------
    halt: the reason in force, or None.
    """

    def __init__(self, group: WorkerGroup, grace_s: float, note: Callable[[str], None]) -> None:
        self._group, self._grace_s, self._note = group, grace_s, note
        self.halt: Halt | None = None
        self._since_s = 0.0
        self._asked = False
        self._told: set[str] = set()

    def look(self, *, end: bool, terminated: Sequence[int], larger: Growth | None) -> Halt | None:
        """The reason in force now.

        Parameters
        ----------
        end: whether the run is to end.
        terminated: ranks whose processes have got SIGTERM.
        larger: a larger group that fits.
        """
        reason = self._reason(end, terminated, larger)
        if reason is not None and reason.outranks(self.halt):
            self.halt, self._since_s, self._asked = reason, time.monotonic(), False
        return self.halt

    def ask(self) -> bool:
        """Ask the ranks, once for each reason. Returns whether they may still be waited for."""
        assert self.halt is not None
        if not self._asked:
            at_most = f" at most {self.halt.limit_s:g} s" if self.halt.limit_s < math.inf else ""
            self._note(f"{self.halt.message}: waiting{at_most} for a last checkpoint")
            self._group.stop()
            self._asked = True
        return time.monotonic() - self._since_s <= self.halt.limit_s

    @property
    def ends(self) -> bool:
        """Whether the run ends with this group."""
        return self.halt is not None and self.halt.then is None

    def then(self) -> Failure | Growth:
        """Why there is a next group, now that this one has stopped."""
        assert self.halt is not None
        assert self.halt.then is not None
        stopped_s = time.monotonic() - self._since_s
        return replace(self.halt.then, message=f"{self.halt.message}, stopped {stopped_s:.1f} s later")

    def explain(self, failure: Failure) -> Failure:
        """What fails while a node goes has failed through that."""
        if self.halt is None or not isinstance(self.halt.then, Failure) or not failure.retryable:
            return failure
        return replace(failure, message=f"{self.halt.message}; {failure.message}", preempted=True)

    def _reason(self, end: bool, terminated: Sequence[int], larger: Growth | None) -> Halt | None:
        now_s = time.time()
        leaving = departures(self._group.view, self._group.ranks, terminated, now_s)
        for name in leaving.keys() - self._told:
            if self.halt is not None:  # else it is the reason, and told as such
                self._note(leaving[name].what)
            self._told.add(name)
        if end:
            return Halt("asked to end", limit_s=self._grace_s)
        for departure in leaving.values():
            if departure.driver:
                left_s = math.inf if departure.at_s is None else departure.at_s - now_s
                # one that is over has not been enforced, or is by another clock
                return Halt(departure.what, limit_s=min(self._grace_s, left_s) if left_s > 0 else self._grace_s)
        if leaving:
            message = "; ".join(departure.what for departure in leaving.values())
            return Halt(message, Failure(message, retryable=True, preempted=True))
        return None if larger is None else Halt(larger.message, larger)
