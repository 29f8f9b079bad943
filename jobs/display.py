"""Progress of a job: bars in a terminal, plain lines anywhere else. The one place that draws progress bars.

    with ProgressBars(console, line_every_s=5.0) as bars:
        for done in range(total):
            ...
            bars.update("encode", done + 1, total, details="4000 images/s")
        bars.note("encoded")

`RunDisplay` puts the phases of a training run on such bars. Tables are in `jobs.reporting`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from cluster.messages import Display, Progress
from cluster.text import size
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""Options of `rich` for a line that is shown as it is."""

LINE_EVERY_S = 5.0
SEPARATOR = " · "
BAR_WIDTHS = (8, 24)
"""Fewest and most columns of a bar; in between a sixth of the terminal."""

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_control(text: str) -> str:
    """A text without colours and other control characters; lines and tabs stay.

    >>> without_control("\\x1b[36mrank 0\\x1b[0m\\r\\n\\tlost")
    'rank 0\\n\\tlost'
    """
    return _CONTROL.sub("", text)


def seconds_left(seconds: float) -> str:
    """An estimate for people.

    >>> seconds_left(12.3), seconds_left(200), seconds_left(5000)
    ('12 s left', '3 min left', '1.4 h left')
    """
    if seconds < 120:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 3600 else f"{seconds / 3600:.1f} h left"


@dataclass
class _Work:
    """Work under way: where and when it was first seen, how far it is, its bar, and its last line."""

    first: float
    started: float
    done: float
    total: float
    details: str = ""
    bar: TaskID | None = None
    line: str = ""
    printed: float = float("-inf")


class ProgressBars:
    """Bars for work under way, one for each name; to be entered for as long as the work runs.

    In a terminal, a bar with its name, counts, elapsed time, and as many of its details as the terminal is wide enough
    for. Anywhere else, lines such as `encode 300/1000 · 6 s left · 4000 images/s`.

    Parameters
    ----------
    console: standard output or standard error.
    keep: leave the bars in the terminal at the end.
    line_every_s: where the console is no terminal, print a line for each name at its beginning, at its end, and after
        so many seconds; None: no lines.
    hide: removes from a note what must not be shown, such as passwords.
    """

    def __init__(
        self,
        console: Console,
        *,
        keep: bool = False,
        line_every_s: float | None = None,
        hide: Callable[[str], str] = str,
    ) -> None:
        self.console, self._line_every_s, self._hide = console, line_every_s, hide
        self._work: dict[str, _Work] = {}
        self._bars = RichProgress(
            _Name(),
            _Bar(console),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            _Details(),
            console=console,
            transient=not keep,
            disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # lines that a pipe waits for must not end up in the console
        )

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, name: str, done: float, total: float, *, text: str | None = None, details: str = "") -> None:
        """How far the work of this name is.

        Parameters
        ----------
        text: what to call it (default: its name).
        details: parts separated by `SEPARATOR`, the most important one first.
        """
        now = time.monotonic()
        work = self._work.get(name)
        if work is None or done < work.done:  # it begins, or begins again
            work = self._work[name] = _Work(done, now, done, total, bar=work.bar if work else None)
        work.done, work.total, work.details = done, total, details
        if work.first < done < total:
            left = (now - work.started) / (done - work.first) * (total - done)
            details = SEPARATOR.join(filter(None, (seconds_left(left), details)))
        text = without_control(text or name)
        if self.console.is_terminal:
            if work.bar is None:
                work.bar = self._bars.add_task(text, total=total, details="")
            self._bars.update(work.bar, description=text, completed=min(done, total), total=total, details=details)
        elif self._line_every_s is not None:
            line = SEPARATOR.join(filter(None, (f"{text} {done:.0f}/{total:.0f}", details)))
            if line != work.line and (done >= total or now - work.printed >= self._line_every_s):
                work.line, work.printed = line, now
                self._print(line)

    def complete(self, name: str) -> None:
        """The work of this name is over, whether or not its last update was seen."""
        work = self._work[name]
        if work.bar is not None:
            self._bars.update(work.bar, completed=work.total, details=work.details)

    def remove(self, name: str) -> None:
        """Take the bar of this name away, if there is one."""
        work = self._work.pop(name, None)
        if work is not None and work.bar is not None:
            self._bars.remove_task(work.bar)

    def note(self, text: object) -> None:
        """A line to read, above the bars."""
        self._print(self._hide(str(text)))

    def _print(self, text: str) -> None:
        self.console.print(without_control(text), **PLAIN)


def load_shown(console: Console, config: DataConfig) -> Dataset:
    """`load_dataset`, which shows how far it is, and then how own images were understood."""
    with ProgressBars(console, line_every_s=LINE_EVERY_S) as bars:
        dataset = load_dataset(config, progress=partial(bars.update, "decode"), warn=bars.note)
        for note in dataset.notes:
            bars.note(note)
    return dataset


class _Bar(BarColumn):
    """A bar whose width follows the terminal's, so that counts keep their room."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        least, most = BAR_WIDTHS
        self.bar_width = max(least, min(most, self._console.width // 6))
        return super().render(task)


class _Name(ProgressColumn):
    """What the work is called; cut where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Details(ProgressColumn):
    """As many of the details, from the first, as the terminal is wide enough for."""

    def render(self, task: Task) -> _FittingParts:
        return _FittingParts(task.fields["details"])


@dataclass(frozen=True)
class _FittingParts:
    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, cell_len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        shown = self.text
        while cell_len(shown) > options.max_width and SEPARATOR in shown:
            shown = shown.rpartition(SEPARATOR)[0]
        yield Text(shown, no_wrap=True, overflow="ellipsis")


# -- training runs -----------------------------------------------------------------------------------------------------


def title(progress: Progress) -> str:
    """Name of a phase: 'layer 0 · learn'."""
    return progress.phase if progress.layer is None else f"layer {progress.layer}{SEPARATOR}{progress.phase}"


def details(progress: Progress) -> str:
    """The measurements of a phase in one line, if there are any."""
    layers = progress.metrics
    if not layers:
        return "" if progress.images_per_second is None else f"{progress.images_per_second:.0f} images/s"
    parts = (
        f"{min(layer.images_per_second for layer in layers):.0f} images/s",
        f"residual {', '.join(f'{layer.residual:.1e}' for layer in layers)}",
        f"active {', '.join(f'{100 * layer.active_fraction:.0f}' for layer in layers)} %",
        f"{size(max(layer.bytes_exchanged for layer in layers))} exchanged",
    )
    return SEPARATOR.join(parts)


class JobDisplay(Display, Protocol):
    """Where a training run shows its progress; entered for as long as it runs."""

    def __enter__(self) -> JobDisplay: ...

    def __exit__(self, *_: object) -> None: ...


MakeDisplay = Callable[[Console, Callable[[str], str]], JobDisplay]
"""(console, what removes from a text what must not be shown) → a display."""


class RunDisplay(ProgressBars):
    """A bar, or a few lines, for every phase of a training run."""

    def __init__(self, console: Console, hide: Callable[[str], str] = str) -> None:
        super().__init__(console, keep=True, line_every_s=LINE_EVERY_S, hide=hide)
        self._phase: str | None = None

    def __enter__(self) -> RunDisplay:
        super().__enter__()
        return self

    def progress(self, latest: Progress) -> None:
        """The latest message of the ranks."""
        phase = title(latest)
        if self._phase is not None and self._phase != phase and latest.phase != "calibrate":  # a pass goes on after it
            self.complete(self._phase)
        self._phase = phase
        self.update(phase, latest.done, latest.total, details=details(latest))
