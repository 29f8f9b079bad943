"""What a person sees while a job runs: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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


def title(latest: dict[str, Any]) -> str:
    """Name of a phase: 'layer 0 · learn'."""
    layer = latest.get("layer")
    return latest["phase"] if layer is None else f"layer {layer} · {latest['phase']}"


def details(latest: dict[str, Any]) -> str:
    """The figures of a phase in one line; those that it does not have are left out."""
    parts = []
    if "images_per_second" in latest:
        parts.append(f"{latest['images_per_second']:.0f} images/s")
    if "residual" in latest:
        parts.append(f"residual {latest['residual']:.1e}")
    if "active_fraction" in latest:
        parts.append(f"active {100 * latest['active_fraction']:.0f} %")
    if "bytes_exchanged" in latest:
        parts.append(f"{size(latest['bytes_exchanged'])} exchanged")
    return " · ".join(parts)


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

    def progress(self, latest: dict[str, Any]) -> None:
        """How far the present phase is; the same may come again and again."""

    def note(self, text: str) -> None:
        """Something to read."""


MakeDisplay = Callable[[Console, Callable[[str], str]], JobDisplay]
"""(console, what removes from a text what must not be shown) → a display."""


class TerminalDisplay:
    """A bar per phase, the present one moving."""

    def __init__(self, console: Console, hide: Callable[[str], str] = str) -> None:
        self._hide = hide
        self._progress = Progress(
            TextColumn("[bold]{task.description:<20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TerminalDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def progress(self, latest: dict[str, Any]) -> None:
        if not latest:
            return
        name = title(latest)
        if name not in self._tasks:
            for task in self._tasks.values():  # an earlier phase is over, whether or not its last word was polled
                self._progress.update(task, completed=self._progress.tasks[task].total)
            self._tasks[name] = self._progress.add_task(name, total=latest["total"], details="")
        self._progress.update(
            self._tasks[name], completed=latest["done"], total=latest["total"], details=details(latest)
        )

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

    def progress(self, latest: dict[str, Any]) -> None:
        if not latest:
            return
        now, name = time.monotonic(), title(latest)
        if name != self._name:
            self._name, self._started, self._first, self._last = name, now, latest["done"], -PLAIN_EVERY_S
        finished = latest["done"] >= latest["total"]
        if now - self._last < PLAIN_EVERY_S and not finished:
            return
        line = " · ".join(filter(None, (f"{name} {latest['done']}/{latest['total']}", details(latest))))
        if not finished and latest["done"] > self._first:
            left = (now - self._started) / (latest["done"] - self._first) * (latest["total"] - latest["done"])
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
