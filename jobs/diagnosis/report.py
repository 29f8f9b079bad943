"""Shows findings as they come: a line each for people, or a JSON object each; and what is waited for."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jobs.diagnosis.findings import Finding, Status
from jobs.display import PLAIN, without_control
from jobs.reporting import plain

COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}

LINE_EVERY_S = 10.0
"""Pause between two lines about what is waited for, where there is no terminal."""


class Report:
    """Findings in the order of their checks, whichever comes first; entered for as long as checks run.

    Parameters
    ----------
    order: names of all checks.
    as_json: objects on standard output, and what is waited for on standard error.
    hide: removes from a text what must not be shown.

    Attributes
    ----------
    findings: shown so far.
    nodes: of the cluster; a finding that is about all of them names none.
    """

    def __init__(self, order: Sequence[str], *, as_json: bool = False, hide: Callable[[str], str] = str) -> None:
        self.findings: list[Finding] = []
        self.nodes = 1
        self._order, self._json, self._hide = list(order), as_json, hide
        self._found: dict[str, list[Finding]] = {}
        self._console = Console()
        self._spinner = Spinner("dots")
        self._live = self._make_live()
        self._begun = self._told = time.monotonic()
        self._width = max(map(len, order))

    def __enter__(self) -> Report:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def _make_live(self) -> Live | None:
        """A line that moves, below the findings; None where no terminal shows it without disturbing what is printed."""
        together = self._console.is_terminal and not self._json
        console = self._console if together else Console(stderr=True)
        if not console.is_terminal or (self._console.is_terminal and self._json):
            return None
        # what a pipe waits for must not end up in the console
        return Live(self._spinner, console=console, transient=True, redirect_stdout=together, redirect_stderr=together)

    def add(self, check: str, findings: Sequence[Finding]) -> None:
        """All that a check has found; shown once those before it are."""
        self._found[check] = list(findings)
        while self._order and self._order[0] in self._found:
            for finding in self._found.pop(self._order.pop(0)):
                self.findings.append(finding)
                self._show(finding)

    def skip(self, *checks: str) -> None:
        """Checks that there is no use in."""
        for check in checks:
            self.add(check, [])

    def waiting(self, checks: Sequence[str]) -> None:
        """What is not known yet."""
        now = time.monotonic()
        text = f"waiting for: {', '.join(checks)} ({now - self._begun:.0f} s)"
        if self._live is not None:
            self._spinner.update(text=text)
        elif now - self._told >= LINE_EVERY_S:
            self._told = now
            print(text, file=sys.stderr, flush=True)

    def _show(self, finding: Finding) -> None:
        if self._json:
            words = {"message": self._hide(finding.text), "fix": self._hide(finding.fix)}
            values = {"check": finding.check, "status": finding.status, **words, "nodes": list(finding.nodes)}
            self._write(values | {"values": plain(finding.values)})
            return
        text, fix = (without_control(self._hide(part)) for part in (finding.where(self.nodes), finding.fix))
        colour = COLOURS[finding.status]
        if not self._console.is_terminal:  # a line, however long
            line = f"{finding.status:<7}  {finding.check:<{self._width}}  {text}{f'; fix: {fix}' if fix else ''}"
            self._console.print(line, **PLAIN)
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=7, no_wrap=True)
        row.add_column(width=self._width, no_wrap=True)
        row.add_column()
        row.add_row(
            Text(finding.status, colour),
            Text(finding.check, "bold" if finding.status != "ok" else ""),
            Text.assemble(text, (f"\nfix: {fix}", "cyan") if fix else ""),
        )
        self._console.print(row)

    def _write(self, values: dict[str, object]) -> None:
        print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)

    def summary(self) -> bool:
        """The last line. Returns whether no check has failed."""
        counts = Counter(finding.status for finding in self.findings)
        seconds = time.monotonic() - self._begun
        failures, warnings = counts["failure"], counts["warning"]
        if self._json:
            status = "failure" if failures else "warning" if warnings else "ok"
            counted = {"ok": counts["ok"], "warnings": warnings, "failures": failures}
            self._write({"check": "summary", "status": status, **counted, "seconds": round(seconds, 1)})
        else:
            words = [
                f"{counts['ok']} ok",
                f"{warnings} warning{'' if warnings == 1 else 's'}",
                f"{failures} failure{'' if failures == 1 else 's'}",
            ]
            verdict = "a run would not work" if failures else "a run can start"
            text = f"{', '.join(words)} in {seconds:.0f} s: {verdict}"
            style = COLOURS["failure" if failures else "warning" if warnings else "ok"]
            self._console.print(Text(text, style), soft_wrap=True, highlight=False)
        return not failures
