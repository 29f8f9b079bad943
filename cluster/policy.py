"""What to do when ranks fail: a policy returns decisions, the controller carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Decision(Enum):
    """RESTART replaces the whole group and continues from the newest checkpoint; STOP ends the run."""

    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class Failure:
    """Why a group cannot go on.

    Attributes
    ----------
    message: one line for people, naming the rank.
    lost: a rank died, hung or was cut off, through no fault of the program: a new group may fare better.
    """

    message: str
    lost: bool


@dataclass(frozen=True)
class FailurePolicy:
    """Restart after a lost rank, at most `max_restarts` times; stop on anything that would happen again."""

    max_restarts: int

    def decide(self, failure: Failure, restarts: int) -> Decision:
        return Decision.RESTART if failure.lost and restarts < self.max_restarts else Decision.STOP
