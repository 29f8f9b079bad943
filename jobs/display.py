"""What a person sees while a job runs: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from cluster.messages import Progress

PLAIN_EVERY_S = 5.0
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3_500_000)
    '3.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def title(progress: Progress) -> str:
    """Name of a phase: 'layer 0 · learn'."""
    return progress.phase if progress.layer is None else f"layer {progress.layer} · {progress.phase}"


def details(progress: Progress) -> str:
    """The figures of a phase in one line, as far as there are any."""
    metrics = progress.metrics
    if metrics is None:
        return "" if progress.images_per_second is None else f"{progress.images_per_second:.0f} images/s"
    return (
        f"{metrics.images_per_second:.0f} images/s · residual {metrics.residual:.1e} · "
        f"active {100 * metrics.active_fraction:.0f} % · {size(metrics.bytes_exchanged)} exchanged"
    )


def without_control(text: str) -> str:
    """A text without colours and other control characters; lines and tabs stay.

    >>> without_control("\\x1b[36mrank 0\\x1b[0m\\r\\n\\tlost")
    'rank 0\\n\\tlost'
    """
    return _CONTROL.sub("", text)


class JobDisplay(Protocol):
    """Where a job tells how it fares; entered for as long as it runs."""

    def __enter__(self) -> JobDisplay: ...

    def __exit__(self, *_: object) -> None: ...

    def progress(self, latest: Progress) -> None:
        """How far the present phase is; the same may come again and again."""

    def note(self, text: str) -> None:
        """Something to read."""


MakeDisplay = Callable[[Console, Callable[[str], str]], JobDisplay]
"""(console, what removes from a text what must not be shown) → a display."""


class TerminalDisplay:
    """A bar per phase, the present one moving."""

    def __init__(self, console: Console, hide: Callable[[str], str] = str) -> None:
        self._hide = hide
        self._progress = bars.Progress(
            bars.TextColumn("[bold]{task.description:<20}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[details]}"),
            bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self._tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> TerminalDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def progress(self, latest: Progress) -> None:
        name = title(latest)
        if name not in self._tasks:
            for task in self._tasks.values():  # an earlier phase is over, whether or not its last word was polled
                self._progress.update(task, completed=self._progress.tasks[task].total)
            self._tasks[name] = self._progress.add_task(name, total=latest.total, details="")
        self._progress.update(self._tasks[name], completed=latest.done, total=latest.total, details=details(latest))

    def note(self, text: str) -> None:
        self._progress.console.print(escape(without_control(self._hide(text))), highlight=False)


class PlainDisplay:
    """Lines without control characters: one for every phase, and one every few seconds within it."""

    def __init__(self, console: Console, hide: Callable[[str], str] = str) -> None:
        self._console, self._hide = console, hide
        self._name, self._printed, self._started, self._first = "", "", 0.0, 0.0
        self._last = -PLAIN_EVERY_S

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def progress(self, latest: Progress) -> None:
        now, name = time.monotonic(), title(latest)
        if name != self._name:
            self._name, self._started, self._first, self._last = name, now, latest.done, -PLAIN_EVERY_S
        finished = latest.done >= latest.total
        if now - self._last < PLAIN_EVERY_S and not finished:
            return
        line = " · ".join(filter(None, (f"{name} {latest.done}/{latest.total}", details(latest))))
        if not finished and latest.done > self._first:
            left = (now - self._started) / (latest.done - self._first) * (latest.total - latest.done)
            line += f" · {left:.0f} s left"
        if line != self._printed:
            self._print(line)
        self._last, self._printed = now, line

    def note(self, text: str) -> None:
        self._print(self._hide(text))

    def _print(self, line: str) -> None:
        self._console.print(without_control(line), markup=False, highlight=False, soft_wrap=True)


def make_display(console: Console, hide: Callable[[str], str] = str) -> JobDisplay:
    """The display that suits the console; `hide` removes from a note what must not be shown."""
    return TerminalDisplay(console, hide) if console.is_terminal else PlainDisplay(console, hide)
