"""Entries of the journal, and the bytes that they become.

    length (4 bytes) · checksum (4 bytes) · kind (1 byte) · length of the head (4 bytes) · head (JSON) · values

Integers are little-endian; the length counts what follows the checksum. The checksum, CRC-32, begins with the entry's
number, so an entry that lies in another place than it was written to does not pass. Values that float32 holds exactly
take 4 bytes each, else 8; images take one byte per value.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs.streaming.records import Fault, LateLabel, Position, Record

FRAME = struct.Struct("<II")
HEAD = struct.Struct("<cI")
MOST_BYTES = 2**30
"""Of one entry."""

LONGEST_RAW = 4096
"""Characters that are kept of what could not be read."""

Why = Literal["full", "deadline", "end"]


@dataclass(frozen=True)
class Boundary:
    """A batch ends here: it holds what came since the one before.

    Attributes
    ----------
    batch: its number, counted from 1.
    why: it was full; its first record had waited for `max_wait_s`; or the job ended.
    """

    batch: int
    why: Why


Item = Record | LateLabel | Fault | Boundary


@dataclass(frozen=True)
class Entry:
    """One entry. `position`: where the source goes on behind it, see `jobs.streaming.records`."""

    item: Item
    position: Position | None = None


def encode(entry: Entry, number: int) -> bytes:
    """The bytes of entry `number` of a journal."""
    item, values = entry.item, b""
    head: list[Any]
    match item:
        case Record():
            kind = b"r"
            stored = _compact(item.values)
            head = [item.id, item.time, item.group, item.label, item.begins, stored.dtype.str, list(stored.shape)]
            values = stored.tobytes()
        case LateLabel():
            kind, head = b"l", [item.id, item.label]
        case Fault():
            raw = item.raw if isinstance(item.raw, str) else item.raw.decode(errors="backslashreplace")
            kind, head = b"f", [item.reason, raw[:LONGEST_RAW], item.place]
        case Boundary():
            kind, head = b"b", [item.batch, item.why]
    text = json.dumps([head, entry.position], separators=(",", ":")).encode()
    payload = b"".join((HEAD.pack(kind, len(text)), text, values))
    if len(payload) > MOST_BYTES:
        raise ValueError(f"expected a record of at most {MOST_BYTES} bytes, got {len(payload)}")
    return FRAME.pack(len(payload), _checksum(payload, number)) + payload


def decode(payload: bytes) -> Entry:
    """The entry of a payload whose checksum is right."""
    kind, length = HEAD.unpack_from(payload)
    stop = HEAD.size + length
    head, position = json.loads(payload[HEAD.size : stop])
    match kind:
        case b"r":
            name, time, group, label, begins, dtype, shape = head
            values = np.frombuffer(payload, dtype, offset=stop).reshape(shape)
            values = values.copy() if values.dtype == np.uint8 else values.astype(np.float64)
            return Entry(Record(name, time, values, label, group, begins), position)
        case b"l":
            return Entry(LateLabel(*head), position)
        case b"f":
            return Entry(Fault(*head), position)
        case b"b":
            return Entry(Boundary(*head), position)
    raise ValueError(f"expected an entry of this version, got kind {kind!r}")


def sound(payload: bytes, checksum: int, number: int) -> bool:
    """Whether these are the bytes that were written as entry `number`."""
    return _checksum(payload, number) == checksum


def _checksum(payload: bytes, number: int) -> int:
    return zlib.crc32(payload, number & 0xFFFFFFFF)


def _compact(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values in the shortest format that holds them exactly."""
    if values.dtype == np.uint8:
        return values
    with np.errstate(over="ignore"):
        short = values.astype("<f4")
    exact = bool((short == values).all()) or np.array_equal(short, values, equal_nan=True)
    return short if exact else values.astype("<f8")
