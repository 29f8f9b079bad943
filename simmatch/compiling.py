"""How a layer behaves under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Let torch.compile leave a function as it is, with all that it calls.

    The dynamics run in buffers of their own until columns have converged: nothing that a compiler speeds up, and writes
    through views that it fails on. What is around the layer is compiled.
    """

    @wraps(function)
    def as_written(*arguments: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            # not before: it takes seconds to import
            untouched: Callable[P, T] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return untouched(*arguments, **options)
        return function(*arguments, **options)

    return as_written
