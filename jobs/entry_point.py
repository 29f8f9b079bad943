"""A job as a program: its exit status is what its `main` returns, even if its output fails.

A full disk, a closed pipe (`| head -1`), a closed terminal or an encoding that lacks a character costs the text that
would have been shown, not the run.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NoReturn, cast

from cluster.log_messages import LOG, LogMessages
from jobs.signals import SignalHandler

FAILED, BAD_INPUT = 1, 2
"""Exit statuses of a job that failed, and of one that was given bad configuration, options or data."""


class TolerantStream:
    """A text stream whose writing raises nothing: what cannot be written is dropped. All else is the stream's own.

    stream: where to write; None, as in Python where the descriptor was closed from the start, drops everything.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream: IO[str] = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def log_to_stderr() -> None:
    """Show what `simmatch` waits for, without secrets, above the progress of the moment."""

    def show(text: str) -> None:
        from cluster.redaction import one_line  # imports torch, which no job should wait for

        print(f"warning: {one_line(text)}", file=sys.stderr)

    LOG.addHandler(LogMessages(show))


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a job's `main` and exit with the status it returns."""
    sys.stdout, sys.stderr = cast("IO[str]", TolerantStream(sys.stdout)), cast("IO[str]", TolerantStream(sys.stderr))
    log_to_stderr()
    with SignalHandler() as signals:
        try:
            status = main()
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            status = signals.status
        signals.on_signal = lambda _: None  # nothing is left to interrupt
        _exit(status)


def _exit(status: int) -> NoReturn:
    """Exit now, without waiting for the threads of this process.

    In the interpreter's own shutdown a thread inside C++ code, as when a model is traced for MLflow, would abort the
    process, and an output that cannot be flushed would change the exit status.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
