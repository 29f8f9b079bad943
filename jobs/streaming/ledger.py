"""What follows from the journal's entries one by one: batches, ids that are known, how far each source was read."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.streaming.entries import Boundary, Entry, Why
from jobs.streaming.records import Fault, LateLabel, Position, Record

ID_BYTES = 16


@dataclass(frozen=True)
class Batch:
    """What came between two boundaries: (number of the entry, item), in order.

    number: of the batch, counted from 1; before: entries before it.
    """

    number: int
    why: Why
    items: tuple[tuple[int, Record | LateLabel | Fault], ...]


class KnownIds:
    """The ids of the last `horizon` records and labels.

    >>> known = KnownIds(horizon=2)
    >>> [known.add(name) for name in ("a", "b", "a", "c", "a")]
    [True, True, False, True, True]
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._keys: dict[bytes, None] = {}

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._keys

    def add(self, name: str) -> bool:
        """Remember an id; returns whether it is a new one."""
        key = _key(name)
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > self._horizon:
            del self._keys[next(iter(self._keys))]
        return True

    def state(self) -> Tensor:
        """uint8 [n, 16], oldest first."""
        array = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, ID_BYTES)
        return torch.from_numpy(array.copy())

    def restore(self, state: Tensor) -> None:
        """As it was when `state` was taken."""
        self._keys = {row.tobytes(): None for row in state.numpy()}


def _key(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=ID_BYTES).digest()


def name_of(item: Record | LateLabel | Fault) -> str | None:
    """By what an item is known to have come already; faults are not known. A record's label is another item."""
    match item:
        case Record():
            return f"record {item.id}"
        case LateLabel():
            return f"label {item.id}"
    return None


class Ledger:
    """Takes the entries of the journal in their order: while they are written, and when they are read again.

    Parameters
    ----------
    ids: horizon of `KnownIds`.
    whole: each record is a window, or an image; else records hold samples that are cut.

    Attributes
    ----------
    entries: taken so far.
    batches: ended so far.
    positions: the last position of each key of the source.
    open: what came since the last boundary.
    size: of `open`, in samples, or in records where each is a window.
    """

    def __init__(self, ids: int, *, whole: bool) -> None:
        self._whole = whole
        self.entries = self.batches = self.size = 0
        self.positions: dict[str, Position] = {}
        self.open: list[tuple[int, Record | LateLabel | Fault]] = []
        self._known = KnownIds(ids)

    def knows(self, item: Record | LateLabel | Fault) -> bool:
        """Whether the item has come before."""
        name = name_of(item)
        return name is not None and name in self._known

    def note(self, position: Position | None) -> None:
        """The source was read so far; also where what came was known, which only snapshots remember."""
        if position is not None:
            self.positions[position["source"]] = position

    def take(self, number: int, entry: Entry) -> Batch | None:
        """The next entry; returns the batch that it ends."""
        assert number == self.entries, f"expected entry {self.entries}, got {number}"
        self.entries += 1
        self.note(entry.position)
        item = entry.item
        if isinstance(item, Boundary):
            batch = Batch(item.batch, item.why, tuple(self.open))
            self.open, self.size, self.batches = [], 0, item.batch
            return batch
        if (name := name_of(item)) is not None:
            self._known.add(name)
        self.open.append((number, item))
        self.size += len(item.values) if isinstance(item, Record) and not self._whole else 1
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, at the end of a batch."""
        return {"ids": self._known.state()}, {"entries": self.entries, "batches": self.batches}

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """As it was when the state was taken."""
        self._known.restore(tensors["ids"])
        self.entries, self.batches = plain["entries"], plain["batches"]
        self.open, self.size = [], 0
