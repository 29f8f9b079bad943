"""A job of Ray's jobs API, seen from outside: its output as it comes, and how it ended."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import aclosing
from typing import Any

from cluster.redaction import one_line
from cluster.timeouts import run_with_timeout
from jobs.entry_point import FAILED
from jobs.signals import Interrupted, exit_status

ANSWER_S = 20.0
"""Longest wait for one answer of the dashboard."""

QUIET_S = 60.0
"""A job that prints nothing for so long is asked for its state: the connection may have died without a sign."""

PATIENCE_S = 120.0
"""Longest time without an answer before the cluster counts as lost."""

PAUSE_S = 1.0
"""Between two attempts."""


class SubmittedJob:
    """A job that was submitted.

    Parameters
    ----------
    address: of the dashboard, for messages.
    submitted: the client that submitted it, and its name.
    """

    def __init__(self, address: str, submitted: tuple[Any, str]) -> None:
        self.address = address
        self._client, self.id = submitted
        self._shown = 0

    def follow(self) -> int:
        """Show its output until it ends. Returns its exit status.

        A connection that breaks is made again; nothing is shown twice.
        """
        answered = shown = time.monotonic()
        why = "no answer"
        try:
            while time.monotonic() - answered < PATIENCE_S:
                try:
                    asyncio.run(self._show_output())
                    shown, lost = time.monotonic(), ""
                except Exception as error:  # whatever aiohttp and Ray make of a broken connection
                    lost = one_line(error)
                try:
                    info = run_with_timeout(ANSWER_S, "ray", lambda: self._client.get_job_info(self.id))
                    answered = time.monotonic()
                    if info.status.is_terminal() and (not lost or answered - shown >= PATIENCE_S):
                        return self._end(info, lost)
                except Exception as error:  # and requests
                    why = one_line(error)
                time.sleep(PAUSE_S)
        except Interrupted as interrupted:
            print(f"error: {interrupted}; the job goes on: ray job stop {self.id} ends it", file=sys.stderr)
            return exit_status(interrupted.signum)
        lost = f"error: the cluster at {self.address} has not answered for {PATIENCE_S:g} s: {why}"
        print(f"{lost}; job {self.id} may still run", file=sys.stderr)
        return FAILED

    async def _show_output(self) -> None:
        """Show what was not shown yet, until the output ends or none comes for `QUIET_S`."""
        before = self._shown  # every connection begins at the start
        async with aclosing(self._client.tail_job_logs(self.id)) as chunks:
            while True:
                try:
                    text = await asyncio.wait_for(anext(chunks), QUIET_S)
                except (StopAsyncIteration, TimeoutError):
                    return
                fresh, before = text[before:], max(0, before - len(text))
                self._shown += len(fresh)
                sys.stdout.write(fresh)
                sys.stdout.flush()

    def _end(self, info: Any, lost: str) -> int:
        """Say how it ended, and why the end of its output is lost, if it is; returns the exit status."""
        if lost:  # such as with the node that the command ran on
            print(f"warning: the output of job {self.id} cannot be shown to its end: {lost}", file=sys.stderr)
        code = {"SUCCEEDED": 0, "STOPPED": exit_status(signal.SIGTERM)}.get(info.status.value, info.driver_exit_code)
        if code is None:  # the command never ran
            print(f"error: job {self.id} failed: {one_line(info.message or 'Ray gives no reason')}", file=sys.stderr)
            return FAILED
        status = code if code >= 0 else exit_status(-code)  # ended by a signal
        print(f"job {self.id}: {info.status.value}, exit status {status}", flush=True)
        return int(status)
