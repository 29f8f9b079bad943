"""Scratch memory that is reused from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Pool:
    """Lends each buffer to one caller at a time, so that calls in several threads never share one.

    It grows to the number of buffers in use at the same time. A copied or unpickled pool is empty.

    >>> pool = Pool()
    >>> buffer = pool.take("activities", lambda: [0.0] * 4)
    >>> pool.give("activities", buffer)
    >>> pool.take("activities", list) is buffer
    True
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Any]] = {}

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()

    def take(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A buffer that was given back under this key, or a new one from `make`."""
        try:
            return self._free[key].pop()  # atomic under the interpreter's lock: no two threads get the same buffer
        except LookupError:
            return make()

    def give(self, key: Hashable, buffer: Any) -> None:
        """Return a buffer to the pool; the caller must not use it any more."""
        self._free.setdefault(key, []).append(buffer)
