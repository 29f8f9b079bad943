"""A job as a process that is watched: what it does now, which processes it has, from where it went on."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.tracking.events import MetricsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool

PIDS = re.compile(r"(\d+) on \S+ \(pid (\d+)\)")
ORIGIN = re.compile(r"from (?:step-(\d+)|the beginning)")
WORDS_KEPT = 40
ORPHANS_S = 30.0
"""Longest that a process may outlive its job."""


class Watched:
    """`python -m jobs.json_progress ARGUMENTS…` and what it has said so far.

    Attributes
    ----------
    pids: processes of the present group, by rank; empty while there is none.
    step: updates done, as last heard; origin: updates done in the checkpoint that the present group began with.
    working_since: when the present group was first heard to work, or None.
    trace: (time, step) as heard.
    said: its last words, for people.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.pids: dict[int, int] = {}
        self.every_pid: set[int] = set()
        self.step = self.origin = 0
        self.working_since: float | None = None
        self.trace: list[tuple[float, int]] = []
        self.said: list[str] = []
        self._arguments = arguments
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.start()

    def start(self) -> None:
        """Give the command, for the first time or again."""
        self.pids, self.working_since = {}, None
        command = [sys.executable, "-m", "jobs.json_progress", *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.every_pid.add(self.process.pid)
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def listen(self, limit_s: float) -> bool:
        """Take in what it says, for so long at most; whether it has ended and has nothing left to say."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._hear(self._lines.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return self.process.poll() is not None and self._lines.empty()

    def leave(self) -> None:
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
        while (alive := [pid for pid in self.every_pid if _lives(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return alive

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.put(line)

    def _hear(self, line: str) -> None:
        try:
            told: dict[str, Any] = json.loads(line)
        except ValueError:
            told = {"note": line.rstrip(), "time": time.time()}
        note = told.get("note")
        if note is None:
            self._progress(told)
            return
        self.said = [*self.said, note][-WORDS_KEPT:]
        origin = ORIGIN.search(note)
        if note.startswith("ranks: "):
            self.pids = {int(rank): int(pid) for rank, pid in PIDS.findall(note)}
            self.every_pid |= set(self.pids.values())
        elif origin is not None:  # of a continued run, or of a new group
            self.origin, self.pids, self.working_since = int(origin[1] or 0), {}, None

    def _progress(self, told: dict[str, Any]) -> None:
        if self.pids and self.working_since is None:
            self.working_since = told["time"]
        self.step = told.get("step", self.step)
        self.trace.append((told["time"], self.step))


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recorded(run_dir: Path) -> list[tuple[int, int]]:
    """(layer, step) of every record of a layer's metrics, in the order of the spool."""
    events = (event for event, _ in Spool(run_dir / SPOOL_NAME).read())
    return [(e.layer, e.step) for e in events if isinstance(e, MetricsEvent) and e.layer is not None]
