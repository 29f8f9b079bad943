"""What a rank tells the controller while it works."""

from __future__ import annotations

from typing import Any, Protocol


class Report(Protocol):
    """Where a rank tells how it fares, and hears whether it is to stop; nothing here waits."""

    stopping: bool
    """Whether the controller has asked this rank to stop at a step that all ranks agree on."""

    def beat(self) -> None:
        """A sign of life, for steps that have nothing else to tell."""

    def progress(self, phase: str, done: int, total: int, **metrics: float) -> None:
        """How far the present phase is; only the last word on a phase counts."""

    def event(self, kind: str, **content: Any) -> None:
        """Something to keep: every event reaches the controller once, in order."""
