"""Work that one rank does while the others wait for it, however long it takes.

It runs in a thread of its own, while the rank's training thread reports that it is alive. What the work calls must
release the interpreter's lock for long stretches, as torch does, so that the controller's polls are answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from cluster.cpus import ThreadClock
from cluster.messages import Outbox
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_from_ranks


class _WorkThread(threading.Thread):
    """A call in a thread, and whether it makes progress: one that hangs uses no processor time."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(name="one-rank", daemon=True)
        self._call = call
        self._clock: ThreadClock | None = None
        self._used_s: float | None = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        self._clock = ThreadClock()
        try:
            with torch.no_grad():  # a setting of each thread
                self._call()
        except BaseException as error:
            self.error = error

    def moved(self) -> bool:
        """Whether it has used processor time since the last call, or has ended."""
        before, self._used_s = self._used_s, 0.0 if self._clock is None else self._clock.seconds
        return before is None or self._used_s is None or self._used_s > before


def on_one_rank(
    work: Callable[[], None] | None,
    exchange: Exchange,
    report: Outbox,
    *,
    device: torch.device,
    pause_s: float,
) -> None:
    """Do `work` on one rank; the others pass None. All ranks return when it is done.

    Every `pause_s`, which is shorter than the timeouts of an exchange and of a stall, the ranks exchange one value.
    Where the work hangs, its rank starts no further exchange, and times out as any other would.

    Raises
    ------
    Exception
        What the work raises, on its own rank.
    """
    thread = None if work is None else _WorkThread(work)
    if thread is not None:
        thread.start()
    done = False
    while not done:
        own = torch.zeros(1, device=device)
        if thread is not None:
            thread.join(pause_s)
            if thread.is_alive() and not thread.moved():
                continue
            if thread.error is not None:
                raise thread.error
            own.fill_(float(not thread.is_alive()))
        report.beat()
        done = bool(gather_from_ranks(own, exchange).any())
