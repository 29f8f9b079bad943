"""What a stream does, for the person at the terminal: a few live lines there, a line from time to time elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.text import count, size
from jobs.display import PLAIN, SEPARATOR, without_control
from jobs.streaming.outcome import Metrics, Outcome, Usage
from jobs.streaming.pipeline import Pipeline

LINE_EVERY_S = 10.0
SHOW_EVERY_S = 0.25
RECENT = 1000
"""Answers whose label is known that the shown accuracy is of."""

SPAN_S = 10.0
"""Of the rate of records."""

FREQUENT = ("fault", "novelty")
"""Events of which one is shown every `LINE_EVERY_S`; all are in the records of the run."""


class Recent:
    """Prequential accuracy of a candidate: of its last answers whose label is known, and of all."""

    def __init__(self) -> None:
        self.all_answered = self.all_right = self.novel = 0
        self._batches: deque[tuple[int, int]] = deque()
        self._answered = self._right = 0

    def add(self, answered: int, right: int) -> None:
        """The answers of one batch."""
        self.all_answered, self.all_right = self.all_answered + answered, self.all_right + right
        self._batches.append((answered, right))
        self._answered, self._right = self._answered + answered, self._right + right
        while self._answered - self._batches[0][0] >= RECENT:
            old = self._batches.popleft()
            self._answered, self._right = self._answered - old[0], self._right - old[1]

    @property
    def accuracy(self) -> float | None:
        return self._right / self._answered if self._answered else None

    @property
    def whole(self) -> float | None:
        return self.all_right / self.all_answered if self.all_answered else None


class StreamDisplay:
    """Shows outcomes and notes.

    hide: removes from a text what must not be shown.
    """

    def __init__(self, console: Console, hide: Callable[[str], str] = str) -> None:
        self._console, self._hide = console, hide
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._shown_s = time.monotonic()
        self._noted_s: dict[str, float] = {}
        self._rates: deque[tuple[float, int]] = deque()
        self.candidates: dict[str, Recent] = {}
        self.windows = self.drifts = self.set_aside = 0
        self._metrics: Metrics | None = None
        self._usage = Usage()

    def __enter__(self) -> StreamDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def restore(self, pipeline: Pipeline) -> None:
        """What is known of the batches before the first one that is added."""
        self.set_aside = pipeline.intake.set_aside
        for name, candidate in pipeline.candidates.items():
            self.drifts += candidate.drifts
            self.candidates.setdefault(name, Recent()).add(candidate.answered, candidate.right)

    def note(self, text: str) -> None:
        """A line to read."""
        self._console.print(without_control(self._hide(text)), **PLAIN)

    def add(self, outcome: Outcome, usage: Usage) -> None:
        """A batch was applied: count, and show from time to time."""
        metrics = self._metrics = outcome.metrics
        self._usage = usage
        self.windows += metrics.windows
        self.set_aside += metrics.faults
        for name, one in metrics.candidates.items():
            recent = self.candidates.setdefault(name, Recent())
            recent.add(one.answered, one.right)
            recent.novel += one.novel
        now = time.monotonic()
        for event in outcome.events:
            self.drifts += event.kind == "drift"
            rare = event.kind not in FREQUENT or now - self._noted_s.get(event.kind, -math.inf) >= LINE_EVERY_S
            if rare and usage.lag_s is not None:  # not of a batch that is applied again
                self._noted_s[event.kind] = now
                self.note(f"record {event.number}: {event.text}")
        self._rates.append((now, metrics.number))
        while now - self._rates[0][0] > SPAN_S:
            self._rates.popleft()
        if now - self._shown_s >= (SHOW_EVERY_S if self._console.is_terminal else LINE_EVERY_S):
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown_s = now
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)
        else:
            self.note(self.line())

    @property
    def begun(self) -> bool:
        """Whether there is a batch to show."""
        return self._metrics is not None

    def idle(self) -> None:
        """Nothing changes."""

    def sync(self) -> None:
        """Nothing of this is kept."""

    @property
    def _per_s(self) -> float:
        (first_s, first), (last_s, last) = self._rates[0], self._rates[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _counts(self) -> list[str]:
        assert self._metrics is not None
        lag = "catching up" if self._usage.lag_s is None else f"{1000 * self._usage.lag_s:.0f} ms behind"
        return [
            f"{self._metrics.number:,} records",
            f"{self._per_s:,.0f}/s",
            f"batch {self._metrics.batch:,}",
            lag,
            count(self.drifts, "drift"),
            f"{self.set_aside:,} set aside",
            f"journal {size(self._usage.journal_bytes)}",
        ]

    def line(self) -> str:
        """The state in one line."""
        assert self._metrics is not None
        champion = self._metrics.champion
        accuracy = self.candidates[champion].accuracy
        shown = "no answer judged yet" if accuracy is None else f"accuracy {accuracy:.3f}"
        return SEPARATOR.join([*self._counts()[:3], f"{champion}: {shown}", *self._counts()[3:]])

    def _table(self) -> Table:
        assert self._metrics is not None
        table = Table(caption=SEPARATOR.join(self._counts()), caption_justify="left", box=None)
        for column in ("", f"accuracy of the last {RECENT:,}", "of all", "judged", "novel", "threshold"):
            table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
        for name, recent in self.candidates.items():
            threshold = self._metrics.candidates[name].threshold
            table.add_row(
                without_control(f"{'▶' if name == self._metrics.champion else ' '} {name}"),
                _shown(recent.accuracy),
                _shown(recent.whole),
                f"{recent.all_answered:,}",
                f"{recent.novel:,}",
                "–" if threshold is None else f"{threshold:.3g}",
            )
        return table


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
