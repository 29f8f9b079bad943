"""A training run as a process that is watched, and what may strike it: for `jobs.chaos`."""

from __future__ import annotations

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.messages import GroupStarted, Progress, StartingPoint
from cluster.tracking.events import MetricsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from jobs.json_progress import Text, read_line

LINES_KEPT = 40
ORPHANS_S = 30.0
"""Longest that a process may outlive its job."""


class WatchedJob:
    """`python -m jobs.json_progress ARGUMENTS…` and what it has reported so far.

    Attributes
    ----------
    pids: processes of the present group, by rank; empty while there is none.
    every_pid: of all groups and drivers so far.
    step: updates done, as last reported.
    start_step: updates done in the checkpoint that the present group started from.
    working_since: when the present group first reported progress, or None.
    trace: (time, step) of every report of progress.
    lines: the last lines of text, for people.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.pids: dict[int, int] = {}
        self.every_pid: set[int] = set()
        self.step = self.start_step = 0
        self.working_since: float | None = None
        self.trace: list[tuple[float, int]] = []
        self.lines: list[str] = []
        self._arguments = arguments
        self._unread: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.start()

    def start(self) -> None:
        """Start the process, for the first time or again."""
        self.pids, self.working_since = {}, None
        command = [sys.executable, "-m", "jobs.json_progress", *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.every_pid.add(self.process.pid)
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def listen(self, limit_s: float) -> bool:
        """Take in its output for `limit_s` seconds. Returns whether it has ended and nothing is left to read."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._take_in(self._unread.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return self.process.poll() is not None and self._unread.empty()

    def strike(self, kind: str, rng: random.Random) -> None:
        """Send one of `STRIKES` to the driver, or to a rank that is drawn."""
        if kind in ENDS_DRIVER:
            self.process.send_signal(STRIKES[kind])
            return
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self.pids[rng.choice(sorted(self.pids))], STRIKES[kind])

    def end(self) -> None:
        """End it, and every process of its own that is left."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            try:
                self.process.wait(ORPHANS_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for child in psutil.wait_procs(children, timeout=5.0)[1]:
                child.kill()

    def orphans(self) -> list[int]:
        """Processes of the job that outlive it by `ORPHANS_S`."""
        deadline = time.monotonic() + ORPHANS_S
        while (alive := [pid for pid in self.every_pid if _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return alive

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._unread.put(line)

    def _take_in(self, line: str) -> None:
        try:
            written, message = read_line(line)
        except ValueError:  # of a library, or an error at the end
            written, message = time.time(), Text(line.rstrip())
        match message:
            case Progress():
                if self.pids and self.working_since is None:
                    self.working_since = written
                self.step = self.step if message.step is None else message.step
                self.trace.append((written, self.step))
            case GroupStarted(ranks):
                self.pids = {rank.rank: rank.pid for rank in ranks}
                self.every_pid |= set(self.pids.values())
            case StartingPoint(step, text):
                self.start_step, self.pids, self.working_since = step, {}, None
                self._keep(text)
            case Text(text):
                self._keep(text)

    def _keep(self, text: str) -> None:
        self.lines = [*self.lines, text][-LINES_KEPT:]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recorded(run_dir: Path) -> list[tuple[int, int]]:
    """(layer, step) of every record of a layer's metrics, in the order of the spool."""
    events = (event for event, _ in Spool(run_dir / SPOOL_NAME).read())
    return [(e.layer, e.step) for e in events if isinstance(e, MetricsEvent) and e.layer is not None]


# -- strikes -----------------------------------------------------------------------------------------------------------


@dataclass
class Strike:
    """One fault.

    Attributes
    ----------
    number, run: of the strike, and of the run that it struck.
    time: when, in Unix time.
    step: updates done by then, as last reported.
    recovered_s: until ranks reported progress again; None: not yet, or nothing was left to do.
    again: updates that are done again because the checkpoint was older.
    survived: the run went on, or was over.
    """

    kind: str
    number: int
    run: int
    time: float
    step: int
    recovered_s: float | None = None
    again: int | None = None
    survived: bool = False

    def fields(self) -> dict[str, Any]:
        """Its part of a row."""
        return {
            "strike": self.number,
            "disturbed_run": self.run,
            "struck_by": self.kind,
            "step": self.step,
            "survived": self.survived,
            "recovered_s": self.recovered_s,
            "again": self.again,
        }


STRIKES = {
    "rank-kill": signal.SIGKILL,
    "rank-stop": signal.SIGSTOP,
    "rank-term": signal.SIGTERM,
    "driver-kill": signal.SIGKILL,
    "driver-term": signal.SIGTERM,
}
"""Name → signal: a rank is killed, suspended or asked to end, the job's driver is killed or asked to end."""

ENDS_DRIVER = {"driver-kill": -signal.SIGKILL, "driver-term": 128 + signal.SIGTERM}
"""Strikes after which the job is started again, and the exit status that belongs to them."""
