"""A time limit for calls that have none: to Ray when the head of its cluster is gone, to object stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

WAKE_S = 0.1
"""Pause between two looks at the call, so that a thread that waits counts as moving, see `cluster.one_rank`."""


def run_with_timeout(limit_s: float, what: str, call: Callable[[], Result]) -> Result:
    """The result of a call, if it returns within `limit_s` seconds.

    It runs in a thread. One that is late is left running: nothing can end it, and it does not delay the program's exit.

    Raises
    ------
    TimeoutError
        The call has not returned in time; the message begins with `what`.
    BaseException
        What the call raises.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and (left_s := deadline - time.monotonic()) > 0:
        thread.join(min(WAKE_S, left_s))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{what}: no answer within {limit_s:g} s")
    return results[0]
