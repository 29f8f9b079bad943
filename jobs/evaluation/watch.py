"""What a person sees while an evaluation measures: bars in a terminal, a line per result anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Watch:
    """A bar for all of the work, and one for each unit that is at work."""

    def __init__(self, progress: Progress, console: Console, total: int) -> None:
        self._progress, self._console = progress, console
        self._all = progress.add_task("rows × seeds", total=total)
        self._bars: dict[str, TaskID] = {}

    def tell(self, key: str, what: str, done: int, total: int) -> None:
        """How far the unit of this name is; it has a bar until it has ended."""
        if key not in self._bars:
            self._bars[key] = self._progress.add_task("", total=None)
        text = escape(f"{key}: {what}")
        self._progress.update(self._bars[key], description=text, completed=min(done, total), total=total)

    def ended(self, key: str) -> None:
        if key in self._bars:
            self._progress.remove_task(self._bars.pop(key))

    def done(self) -> None:
        self._progress.advance(self._all)

    def note(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)


@contextmanager
def watching(console: Console, total: int) -> Iterator[Watch]:
    """Bars for as long as the rows take."""
    columns = (TextColumn("{task.description:<56}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Watch(progress, console, total)
