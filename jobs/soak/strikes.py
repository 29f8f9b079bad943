"""What strikes a job, when, and what it took to recover."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jobs.soak.watched import Watched


@dataclass
class Strike:
    """One fault.

    Attributes
    ----------
    number, run: of the strike, and of the run that it struck.
    time: when, Unix; step: updates done by then, as last heard.
    recovered_s: until ranks were heard to work again; None: not yet, or they had nothing left to do.
    again: updates that are done again because the checkpoint was older.
    survived: the run went on, or was over.
    """

    kind: str
    number: int
    run: int
    time: float
    step: int
    recovered_s: float | None = None
    again: int | None = None
    survived: bool = False

    def fields(self) -> dict[str, Any]:
        """Its part of a row."""
        return {
            "strike": self.number,
            "disturbed_run": self.run,
            "struck_by": self.kind,
            "step": self.step,
            "survived": self.survived,
            "recovered_s": self.recovered_s,
            "again": self.again,
        }


def _rank(number: signal.Signals) -> Callable[[Watched, random.Random], None]:
    def strike(job: Watched, rng: random.Random) -> None:
        pid = job.pids[rng.choice(sorted(job.pids))]
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, number)

    return strike


def _driver(number: signal.Signals) -> Callable[[Watched, random.Random], None]:
    def strike(job: Watched, _: random.Random) -> None:
        job.process.send_signal(number)

    return strike


STRIKES: dict[str, Callable[[Watched, random.Random], None]] = {
    "rank-kill": _rank(signal.SIGKILL),
    "rank-stop": _rank(signal.SIGSTOP),
    "driver-kill": _driver(signal.SIGKILL),
    "driver-term": _driver(signal.SIGTERM),
}
"""Name → what it does: a rank dies or stands still, the job's driver dies or is asked to end."""

ENDS_DRIVER = {"driver-kill": -signal.SIGKILL, "driver-term": 128 + signal.SIGTERM}
"""Strikes after which the command is given again, and the exit status that belongs to them."""
