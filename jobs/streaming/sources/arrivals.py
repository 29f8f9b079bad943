"""Files of a folder in the order in which they arrive, each once it is complete."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from simmatch.data.formats import DataError
from simmatch.data.places import walk

LOOK_S = 0.5
"""Pause between two looks at the folder."""


@dataclass(frozen=True)
class Arrival:
    """A file that is complete.

    >>> Arrival("worn/a.npy", size=128, changed_ns=1).name
    'worn/a.npy'
    """

    name: str
    """Its path in the folder."""
    size: int
    changed_ns: int
    """Time of its last change, in nanoseconds since 1970."""


class Arrivals:
    """Looks at a folder, and remembers what was there: as much memory as there are files.

    A file is complete when its size and time have not changed for `settle_s`. Whoever renames it into place, in one
    file system, or moves it out of a name with one of the endings `temporary`, need not fear that it is read before.

    Parameters
    ----------
    folder: absolute; it may come later.
    order: of files found by one look: by their names, or by the times of their last changes.
    left_out: a file that is not looked at, by its name.
    follow: False: one look, at which all files are taken as complete.
    tell: is given one line while the folder cannot be read.
    """

    def __init__(
        self,
        folder: str,
        *,
        order: Literal["name", "time"],
        settle_s: float,
        left_out: Callable[[str], bool],
        follow: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._order, self._settle_s, self._left_out = folder, order, settle_s, left_out
        self._follow, self._tell = follow, tell
        self._seen: dict[str, tuple[Arrival, float]] = {}
        """Of each file what it was at the last look, and since when."""
        self._given: dict[str, Arrival] = {}
        self._looked_s = -LOOK_S
        self._failing = False
        self.over = False
        """There will be no more."""

    def look(self) -> list[Arrival]:
        """The files that are complete, and were not given before as they are."""
        now_s = time.monotonic()
        if self.over or now_s - self._looked_s < LOOK_S:
            return []
        self.over = not self._follow
        try:
            found = {arrival.name: arrival for arrival in self._files()}
            self._failing = False
        except DataError as error:
            if self.over:
                raise
            if not self._failing:
                self._failing = True
                self._tell(f"source.folder: {error}; it is looked for again")
            found = {}
        known = self._seen
        self._seen = {
            name: known[name] if name in known and known[name][0] == arrival else (arrival, now_s)
            for name, arrival in found.items()
        }
        if not self._failing:
            self._given = {name: arrival for name, arrival in self._given.items() if name in found}
        wait_s = self._settle_s if self._follow else 0.0
        ready = [
            arrival
            for arrival, since_s in self._seen.values()
            if now_s - since_s >= wait_s and self._given.get(arrival.name) != arrival
        ]
        self._given |= {arrival.name: arrival for arrival in ready}
        self._looked_s = time.monotonic()
        by_time = self._order == "time"
        return sorted(ready, key=lambda arrival: (arrival.changed_ns if by_time else 0, arrival.name))

    def _files(self) -> Iterator[Arrival]:
        for name in walk(self._folder):
            if not self._left_out(name):
                try:
                    status = os.stat(os.path.join(self._folder, name))
                except OSError:
                    continue  # gone meanwhile
                yield Arrival(name, status.st_size, status.st_mtime_ns)
