"""Scratch memory that outlives a call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Pool:
    """Lends each piece of scratch to one call at a time, so that calls in several threads never meet in one.

    It grows to what the calls of a moment need. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Any]] = {}

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()

    def take(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A piece that was given back under this key, or a new one."""
        try:
            return self._free[key].pop()  # one step for the interpreter: no other thread gets the same piece
        except LookupError:
            return make()

    def give(self, key: Hashable, piece: Any) -> None:
        """Take a piece back, which the caller no longer looks at."""
        self._free.setdefault(key, []).append(piece)
