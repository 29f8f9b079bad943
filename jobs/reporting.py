"""What jobs measure and how they show it: the one place for tables, JSON rows, figure files, hardware and commit.

* `Table`: text cells, shown in a terminal or a log (`show`), or as GitHub's Markdown (`markdown`).
* `Report`: the output of one call of a benchmark: JSON rows, one per line, on standard output and in a file; tables,
  notes and progress on standard error, so that a pipe sees JSON alone; figures in the run directory.
* `hardware`, `git_commit`: what a measurement ran on.
* `save_figure`: a matplotlib figure as a PNG file.
* `plain`: a value as JSON has it; `cell`: the same for people.

Progress bars are in `jobs.display`, counts with their nouns in `cluster.text`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from cluster.cpus import allowed_cpus
from jobs.display import PLAIN, ProgressBars
from jobs.origin import git_commit
from simmatch.config import ConfigError
from simmatch.devices import cpu_model
from simmatch.files import make_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = 6
"""Significant digits of a number in a row; a clock has fewer."""

NONE = "–"
"""A cell without a value."""

NAME_WIDTH = 24
"""Columns that the first cell of a row may take in a terminal that is too narrow for the table."""


class MissingError(RuntimeError):
    """Something that a benchmark needs is not installed or not allowed here; the message is one line."""


class Report:
    """The rows, tables and figures of one call of a benchmark, in one run directory.

    Rows are appended to `<run_dir>/<name>.jsonl`. A call never removes what an earlier one wrote: every row carries
    `run`, the time at which its call began.

    Parameters
    ----------
    name: the benchmark's.
    run_dir: where the files go; made here.

    Attributes
    ----------
    tables: shown so far.

    Raises
    ------
    ConfigError
        A folder that cannot be made or written to.
    """

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name, self.run_dir = name, run_dir
        self.tables: list[Table] = []
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.console = Console(stderr=True)
        self.path = run_dir / f"{name}.jsonl"
        try:
            make_folder(run_dir)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--run-dir: expected a folder to write to, got {run_dir}: {error.strerror}") from None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def row(self, **fields: Any) -> None:
        """One JSON object on its own line: `benchmark`, `run`, then the fields.

        Tensors and arrays of one element become numbers, other arrays lists, dataclasses objects; a value that JSON
        cannot express (NaN, infinity) becomes null.
        """
        values = {"benchmark": self.name, "run": self.started} | fields
        line = json.dumps(plain(values), ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        print(line, file=sys.stdout, flush=True)

    def environment(self, options: Mapping[str, Any]) -> None:
        """The first row: the hardware and software, and how the benchmark was called."""
        self.row(kind="environment", **hardware(), options=dict(options))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Some rows for people."""
        self.tables.append(Table(title, columns, rows))
        self.tables[-1].show(self.console)

    def rows_table(self, title: str, headings: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Some rows of `row` for people; headings: field → heading of its column."""
        self.table(title, list(headings.values()), [[row.get(field) for field in headings] for row in rows])

    def note(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, **PLAIN)

    @contextmanager
    def figure(self, name: str, width: float = 7.0, height: float = 4.5) -> Iterator[Figure]:
        """A matplotlib figure to draw on, saved as `<run_dir>/figures/<name>.png` at the end."""
        from matplotlib.figure import Figure  # most jobs that import this draw nothing

        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        save_figure(figure, self.run_dir / "figures" / f"{name}.png")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """Progress of long work in `total` parts; yields `step(text)`, to be called as each part begins."""
        with ProgressBars(self.console) as bars:
            begun = 0

            def step(text: str) -> None:
                nonlocal begun
                bars.update("", begun, total, text=text)
                begun += 1
                if not self.console.is_terminal:
                    self.note(f"{begun}/{total} {text}")

            yield step


@dataclass(frozen=True)
class Table:
    """A table: its first column names the rows and is aligned left, the others right.

    >>> table = Table("Accuracy", ("row", "seeds", "all"), [("NSM", 5, 0.8716), ("k|means", 5, None)])
    >>> print(table.markdown())
    Accuracy:
    <BLANKLINE>
    | row | seeds | all |
    | --- | ---: | ---: |
    | NSM | 5 | 0.872 |
    | k\\|means | 5 | – |
    <BLANKLINE>

    Attributes
    ----------
    title: above the table.
    columns: headings.
    rows: cells of every row, shown as `cell` has them.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def show(self, console: Console) -> None:
        """Print it. In a narrow terminal names are folded and cells broken at spaces, and columns that still do not fit
        follow as a table of their own; a log is as wide as needed."""
        table = self._rich(folded=False)
        unlimited = console.options.update(max_width=sys.maxsize)
        needed = console.measure(table, options=unlimited).maximum
        if not console.is_terminal:
            console.width = max(console.width, needed)
        elif needed > console.width:
            table = self._rich(folded=True)
            if len(self.columns) > 2 and console.measure(table, options=unlimited).minimum > console.width:
                half = 1 + len(self.columns) // 2
                for title, part in ((self.title, slice(1, half)), (f"{self.title} (continued)", slice(half, None))):
                    columns, *rows = ((row[0], *row[part]) for row in (self.columns, *self.rows))
                    Table(title, columns, rows).show(console)
                return
        console.print(table)

    def markdown(self) -> str:
        """As GitHub sets it, below its title."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        # a bar would end the cell, a line break the table
        rows = [[" ".join(cell(value).split()).replace("|", "\\|") for value in row] for row in self.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *rows)]
        return "\n".join([f"{self.title}:", "", *lines, ""])

    def _rich(self, *, folded: bool) -> TerminalTable:
        table = TerminalTable(title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        # a spread is glued to its sign: a cell in two lines is broken between the mean and the spread
        rows = [[cell(value).replace("± ", "±") for value in row] for row in self.rows]
        if folded:
            rows = [[textwrap.fill(name, NAME_WIDTH), *others] for name, *others in rows]
        for index, heading in enumerate(self.columns):
            words = [word for text in (heading, *(row[index] for row in rows)) for word in text.split()]
            table.add_column(
                escape(heading),
                justify="right" if index else "left",
                no_wrap=index == 0,
                min_width=max(map(len, words), default=None),
            )
        for row in rows:
            table.add_row(*map(escape, row))
        return table


def save_figure(figure: Figure, path: Path) -> None:
    """A figure as a PNG file."""
    write_whole(path, partial(figure.savefig, format="png", dpi=110))


def plain(value: Any) -> Any:
    """A value as JSON has it.

    >>> plain({"ratio": torch.tensor(2.0), "lost": float("nan"), "seconds": [1 / 3]})
    {'ratio': 2.0, 'lost': None, 'seconds': [0.333333]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # tensors and NumPy's values
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def cell(value: Any) -> str:
    """A value for people: floats in three significant digits.

    >>> cell(12345), cell(1 / 3), cell(2345.6), cell(float("nan")), cell("0.5 ± 0.1")
    ('12,345', '0.333', '2,346', '–', '0.5 ± 0.1')
    """
    value = plain(value)
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# -- hardware ----------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """What a measurement runs on: processor, cores, threads, load, versions, commit."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "cores_available": allowed_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
    }
