"""Rows against their JSON, tables against golden ones and the cells they were given, hardware against this machine."""

from __future__ import annotations

import io
import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.reporting import Report, Table, cell, hardware, plain


@dataclass(frozen=True)
class Range:
    min: float
    max: float


def test_rows_are_json_lines_on_stdout_and_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second call adds to the file
        with Report("demo", tmp_path) as report:
            report.row(kind="a", loss=torch.tensor(0.25), lost=float("nan"), path=tmp_path, spread=Range(0.5, 2.0))
            report.table("A table", ["name", "value"], [["x", 12345.678], ["y", None]])
            with report.progress(2) as step:
                step("first")
                step("second")
            report.row(kind="b", values=np.arange(3), text="ä\n[bold]")
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["kind"] for row in rows] == ["a", "b", "a", "b"]
    assert rows[0] == {
        "benchmark": "demo", "run": rows[0]["run"], "kind": "a", "loss": 0.25, "lost": None, "path": str(tmp_path),
        "spread": {"min": 0.5, "max": 2.0},
    }  # fmt: skip
    assert rows[1]["values"] == [0, 1, 2]
    assert rows[1]["text"] == "ä\n[bold]"
    assert (tmp_path / "demo.jsonl").read_text().splitlines() == lines
    assert "12,346" in shown.err
    assert "2/2 second" in shown.err


def test_a_figure_is_saved(tmp_path: Path) -> None:
    with Report("demo", tmp_path) as report, report.figure("line", width=4.0, height=2.0) as figure:
        figure.subplots().plot([0, 1], [0, 1], color="red")
    picture = matplotlib.image.imread(tmp_path / "figures" / "line.png")
    assert picture.shape[:2] == (220, 440)
    assert ((picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)).sum() > 100  # a red line


def test_hardware_is_this_machine() -> None:
    facts = plain(hardware())
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode == 0:
        assert done.stdout.startswith(facts["commit"].removesuffix("+"))
    else:
        assert facts["commit"] is None
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores_available"] >= 1
    assert len(facts["load_average"]) == 3
    assert facts["cpu"]


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("inf"), "–"), (0.00012345, "0.000123"), (999.6, "1,000"), (1000.4, "1,000"), (True, "True")],
)
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


TABLE = Table(
    "Accuracy, mean ± standard deviation",
    ("row", "seeds", "10 labels per class", "parameters"),
    [
        ("similarity matching, supervised | α = 3", 5, "0.871 ± 0.002", 1_234_567),
        ("[red]k-means[/red]", 1, "0.871", None),
    ],
)
GOLDEN = """\
Accuracy, mean ± standard deviation:

| row | seeds | 10 labels per class | parameters |
| --- | ---: | ---: | ---: |
| similarity matching, supervised \\| α = 3 | 5 | 0.871 ± 0.002 | 1,234,567 |
| [red]k-means[/red] | 1 | 0.871 | – |
"""


def test_golden_markdown() -> None:
    assert TABLE.markdown() == GOLDEN
    with_line_break = Table("t", ("a", "b"), [("two\nlines", 1)])
    assert "| two lines | 1 |" in with_line_break.markdown()


def shown(table: Table, width: int, *, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, no_color=True)
    table.show(console)
    return console.file.getvalue().splitlines()


def test_a_log_is_as_wide_as_its_table() -> None:
    lines = shown(TABLE, 20, terminal=False)
    assert any(
        line.split()
        == ["similarity", "matching,", "supervised", "|", "α", "=", "3", "5", "0.871", "±0.002", "1,234,567"]
        for line in lines
    )
    assert any(line.split() == ["[red]k-means[/red]", "1", "0.871", "–"] for line in lines)
    assert shown(Table("none", ("a", "b"), []), 20, terminal=False)


@pytest.mark.parametrize("width", [44, 66, 70, 80, 120])
def test_no_word_is_cut_in_a_terminal(width: int) -> None:
    """Names are folded and cells broken at spaces where it is narrow; then columns are shown in parts."""
    lines = shown(TABLE, width, terminal=True)
    text = "\n".join(lines)
    for code in ("\x1b[1m", "\x1b[3m", "\x1b[0m"):
        text = text.replace(code, "")
    assert max(map(len, text.splitlines())) <= width
    words = [word for row in (TABLE.columns, *TABLE.rows) for value in row for word in cell(value).split()]
    wanted = Counter("±0.002" if word == "0.002" else word for word in words if word != "±")
    assert wanted <= Counter(text.split())
