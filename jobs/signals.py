"""Signals that end a job: Ctrl-C, a cluster's SIGTERM and a closed terminal's SIGHUP, each with its own exit status."""

from __future__ import annotations

import signal
from collections.abc import Callable

CONTINUES = "the same command continues"
"""Told where a signal has ended a job."""


def termination_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP, unless the program is to outlive its terminal (`nohup`)."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def exit_status(signum: int) -> int:
    """Exit status of a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + signum


class Interrupted(KeyboardInterrupt):
    """A signal asked the job to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"ended by {signal.Signals(signum).name}")


class SignalHandler:
    """While this is entered, SIGINT, SIGTERM and SIGHUP raise `Interrupted`; for the main thread only.

    Only the first SIGTERM or SIGHUP does, because an orderly end may take a while; every SIGINT does. The handler
    remembers the signal, for libraries in between may turn the exception into another.

    Attributes
    ----------
    on_signal: if set, signals call it with their number, and raise nothing themselves.
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        self.on_signal = on_signal
        self._signum = signal.SIGINT

    @property
    def status(self) -> int:
        """Exit status of a program that was interrupted."""
        return exit_status(self._signum)

    def __enter__(self) -> SignalHandler:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Handle signals from now on."""
        self._before = {signum: signal.signal(signum, self._handle) for signum in termination_signals()}

    def _handle(self, signum: int, _: object) -> None:
        if self.on_signal is not None:
            self.on_signal(signum)
        elif signum == signal.SIGINT:
            raise Interrupted(signum)
        elif self._signum == signal.SIGINT:
            self._signum = signal.Signals(signum)
            raise Interrupted(signum)
