"""SIGTERM as an interruption: what a cluster sends a job ends it as Ctrl-C does, with an exit status of its own."""

from __future__ import annotations

import signal

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses, 128 + the signal's number."""


class Ending:
    """Within this block the first SIGTERM raises KeyboardInterrupt, others do nothing; for the main thread alone.

    It remembers which signal it was, for libraries in between may pass an exception on as another.
    """

    def __init__(self) -> None:
        self._terminated = False

    @property
    def status(self) -> int:
        """Exit status of a program that was interrupted."""
        return TERMINATED if self._terminated else INTERRUPTED

    def __enter__(self) -> Ending:
        self._before = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _end(self, *_: object) -> None:
        if not self._terminated:
            self._terminated = True
            raise KeyboardInterrupt
