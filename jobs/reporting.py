"""What a benchmark tells: rows for programs, tables and progress for people, figures for both.

Rows are JSON objects, one per line, on standard output and in a file; everything else goes to standard error, so that
a pipe sees JSON alone.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.cpus import allowed_cpus
from jobs.figures import save
from simmatch.config import ConfigError
from simmatch.files import make_folder

DIGITS = 6
"""Significant digits of a number in a row; a clock has fewer."""

FILE_WIDTH = 160
"""Columns of a table where no terminal says how many there are."""


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

    Raises
    ------
    ConfigError
        A folder that cannot be made or written to.
    """

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name, self.run_dir = name, run_dir
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.console = Console(stderr=True)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH
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
        """The first row: what the figures were measured on, and how the benchmark was called."""
        self.row(kind="environment", **hardware(), options=dict(options))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """The people's view of some rows; floats in three significant digits."""
        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(escape(_for_people(value)) for value in row))
        self.console.print(table)

    def note(self, text: str) -> None:
        """A line for people."""
        self.console.print(escape(text), highlight=False)

    @contextmanager
    def figure(self, name: str, width: float = 7.0, height: float = 4.5) -> Iterator[Figure]:
        """A matplotlib figure to draw on, saved as `<run_dir>/figures/<name>.png` at the end."""
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        save(figure, self.run_dir / "figures" / f"{name}.png")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar on standard error while long work runs; yields `step(text)`, to be called as each part begins."""
        with Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # rows that a pipe waits for must not end up here
        ) as progress:
            task = progress.add_task("", total=total)
            begun = 0

            def step(text: str) -> None:
                nonlocal begun
                progress.update(task, description=escape(text), completed=begun)
                begun += 1
                if not self.console.is_terminal:
                    self.note(f"{begun}/{total} {text}")

            yield step


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


def _for_people(value: Any) -> str:
    value = plain(value)
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def hardware() -> dict[str, Any]:
    """What the measurement runs on: processor, cores, threads, load, versions, commit."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "cores_available": allowed_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with '+' where files differ from it; None outside of a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10.0
        )  # fmt: skip
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
