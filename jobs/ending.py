"""Signals as an interruption: what a cluster or a closed terminal sends a job ends it as Ctrl-C does, with an exit
status of its own.
"""

from __future__ import annotations

import signal
from collections.abc import Callable


def asking_to_end() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP, which a closed terminal sends; not where the program is to outlive it (`nohup`)."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def status_of(signum: int) -> int:
    """Exit status of a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + signum


class Ending:
    """Within this block SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does; for the main thread alone.

    Of SIGTERM and SIGHUP only the first one does: what is ended in order may take a while. It remembers which signal it
    was, for libraries in between may pass an exception on as another.

    Attributes
    ----------
    instead: once set, signals call this and raise nothing: for the end itself, in which they may only cut waits short.
    """

    def __init__(self) -> None:
        self.instead: Callable[[], None] | None = None
        self._signum = signal.SIGINT

    @property
    def status(self) -> int:
        """Exit status of a program that was interrupted."""
        return status_of(self._signum)

    def __enter__(self) -> Ending:
        self._before = {signum: signal.signal(signum, self._end) for signum in asking_to_end()}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _end(self, signum: int, _: object) -> None:
        if self.instead is not None:
            self.instead()
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        elif self._signum == signal.SIGINT:
            self._signum = signal.Signals(signum)
            raise KeyboardInterrupt
