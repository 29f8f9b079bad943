"""A limit for calls that have none of their own: to Ray when the head of its cluster is gone, to object stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

WAKE_S = 0.1
"""Pause between two looks at the call: who waits for it moves, as `cluster.lone_work` understands it."""


def run_with_timeout(limit_s: float, what: str, call: Callable[[], Result]) -> Result:
    """The result of a call that is given so many seconds.

    It runs in a thread, which is left behind when it is late: nothing can end it, and it holds up no exit.

    Raises
    ------
    TimeoutError
        `what` did not happen in time.
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
