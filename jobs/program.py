"""A job as a program of its own: what it prints never ends it, and its exit status is what its `main` returns.

A full disk, a reader that is gone (`| head -1`), a closed terminal or an encoding that lacks a sign cost what would
have been shown, not the run.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NoReturn, cast

from jobs.ending import Ending


class Lasting:
    """A text stream that raises nothing: what it cannot take is dropped. All else is the stream's own.

    stream: None, as Python has it where the descriptor was closed from the start, takes nothing.
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


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a job's `main` and leave this process with the status it returns."""
    sys.stdout, sys.stderr = cast("IO[str]", Lasting(sys.stdout)), cast("IO[str]", Lasting(sys.stderr))
    with Ending() as ending:
        try:
            status = main()
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            status = ending.status
        ending.instead = _nothing
        leave(status)


def leave(status: int) -> NoReturn:
    """End this process, whatever its threads are doing.

    At the interpreter's own end a thread that is inside C++ code, as when a model is traced for MLflow, aborts it, and
    an output that cannot be flushed changes its status.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _nothing() -> None:
    """The program is over: a signal has nothing to end."""
