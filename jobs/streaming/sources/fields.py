"""From the fields of a JSON object or of a line of CSV to a record, a late label, or a fault. Nothing is executed, and
nothing that comes from outside raises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from jobs.streaming.records import Fault, LateLabel, Record
from simmatch.config import Frozen, PositiveInt
from simmatch.documents import DocumentError, load_json, quoted

LONGEST_NAME = 200
"""Characters of an id, a label or a group."""


class RecordKeys(Frozen):
    """Which fields of a JSON object, or columns of a CSV file, hold what.

    >>> RecordKeys(id_field="serial").time_field
    'time'
    """

    id_field: str | None = "id"
    """The id of a record: text, or an integer. None: the place in the file is its id; not with `mqtt`."""

    time_field: str | None = "time"
    """Its time: seconds as a number, or a date in ISO 8601, of UTC where it names no zone. None: with files, the number
    of the record; not with `mqtt`."""

    values_field: str = "values"
    """Of JSON: a list of C numbers, one sample; a list of T such lists, samples in a row; or lists [C][H][W] of
    integers from 0 to 255, an image. `null` and NaN stand for a missing value."""

    columns: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """The channels, each by the name of its field: one sample per record. Needed for CSV; instead of `values_field`."""

    label_field: str | None = "label"
    """The name of the class, where there is one: text, or an integer. A record of an id and a label, and without values
    and time, is the label of a record that came before. None: there are no labels."""

    group_field: str | None = "group"
    """The machine that the record comes from, where there is one: text, or an integer. None: there are no groups."""

    max_record_bytes: PositiveInt = 2**20
    """A longer line, or message, is set aside, and only so much of it is kept."""


@dataclass(frozen=True)
class Place:
    """Where a record was found, and what it is called where it does not say so itself.

    >>> Place("log.csv, line 3", "log.csv/3", 3.0).name
    'log.csv, line 3'
    """

    name: str
    id: str | None = None
    time: float | None = None


class _Unfit(ValueError):
    """The reason why fields are no record."""


def from_json(raw: bytes, keys: RecordKeys, place: Place) -> Record | LateLabel | Fault:
    """One JSON object in UTF-8.

    >>> record = from_json(b'{"id": "a", "time": 2, "values": [1, null], "label": "on"}', RecordKeys(), Place("t"))
    >>> record.values.tolist(), record.label
    ([[1.0, nan]], 'on')
    >>> from_json(b'{"id": "a", "label": "on"}', RecordKeys(), Place("t"))
    LateLabel(id='a', label='on')
    >>> from_json(b'{"id": "a"', RecordKeys(), Place("t")).reason
    "expected JSON: Expecting ',' delimiter: line 1 column 11 (char 10)"
    """
    try:
        fields = load_json(raw.decode())
    except DocumentError as error:
        return Fault(str(error), raw, place.name)
    except UnicodeDecodeError as error:
        return Fault(f"expected UTF-8, got byte 0x{raw[error.start]:02x}", raw, place.name)
    if not isinstance(fields, dict):
        return Fault(f"expected a JSON object, got {quoted(fields)}", raw, place.name)
    return from_fields(fields, keys, place, raw)


def from_fields(fields: Mapping[str, Any], keys: RecordKeys, place: Place, raw: bytes) -> Record | LateLabel | Fault:
    """Fields by name: of JSON, or texts of CSV, of which an empty one counts as missing.

    >>> from_fields({"id": "a", "time": "1", "x": "nan"}, RecordKeys(columns=("x",)), Place("t"), b"").values.tolist()
    [[nan]]
    >>> from_fields({"id": "a", "time": 1, "values": [[1], [2, 3]]}, RecordKeys(), Place("t"), b"").reason
    'values: expected lists of one length, got [[1], [2, 3]]'
    """
    try:
        return _item(fields, keys, place)
    except _Unfit as error:
        return Fault(str(error), raw, place.name)


def _item(fields: Mapping[str, Any], keys: RecordKeys, place: Place) -> Record | LateLabel:
    name = _name(fields, keys.id_field) if keys.id_field is not None else place.id
    label = _name(fields, keys.label_field) if keys.label_field is not None else None
    if name is None:
        raise _Unfit(f"expected a field {quoted(keys.id_field)}, got {_known(fields)}")
    wanted = keys.columns or (keys.values_field,)
    empty = all(_missing(fields.get(key)) for key in wanted)
    timeless = keys.time_field is None or _missing(fields.get(keys.time_field))
    if empty and timeless and label is not None and keys.id_field is not None:
        return LateLabel(name, label)
    time = _time(fields, keys.time_field) if keys.time_field is not None else place.time
    assert time is not None, "a source that knows no time needs a field"
    if absent := [key for key in wanted if key not in fields]:
        raise _Unfit(f"expected a field {quoted(absent[0])}, got {_known(fields)}")
    if keys.columns is not None:
        values = np.array([[_number(fields[key], key) for key in keys.columns]])
    else:
        values = _values(fields[keys.values_field], keys.values_field)
    group = _name(fields, keys.group_field) if keys.group_field is not None else None
    return Record(name, time, values, label, group or "")


def _known(fields: Mapping[str, Any]) -> str:
    return f"fields {', '.join(quoted(key) for key in list(fields)[:20])}" if fields else "no fields"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _name(fields: Mapping[str, Any], key: str) -> str | None:
    """An id, a label or a group: text that can be printed."""
    value = fields.get(key)
    if _missing(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64:
        return str(value)
    if not isinstance(value, str) or not value.isprintable():
        raise _Unfit(f"{key}: expected printable text or an integer, got {quoted(value)}")
    value = value.strip()
    if len(value) > LONGEST_NAME:
        raise _Unfit(f"{key}: expected at most {LONGEST_NAME} characters, got {len(value)}")
    return value


def _number(value: Any, key: str) -> float:
    """A value of a channel; a missing one is NaN."""
    if _missing(value):
        return math.nan
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and "_" not in value:
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise _Unfit(f"{key}: expected a number, got {quoted(value)}")


def _time(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get(key)
    try:
        seconds = math.nan if _missing(value) else _number(value, key)
    except _Unfit:
        seconds = _date(value)
    if not math.isfinite(seconds):
        raise _Unfit(f"{key}: expected seconds or a date in ISO 8601, got {quoted(value)}")
    return seconds


def _date(value: Any) -> float:
    """Seconds since 1970 of a date, NaN of anything else."""
    try:
        date = datetime.fromisoformat(value.strip())
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, AttributeError, TypeError):
        return math.nan


def _values(value: Any, key: str) -> np.ndarray[Any, np.dtype[Any]]:
    """[T, C] float64 or [C, H, W] uint8."""
    try:
        table = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        raise _Unfit(f"{key}: expected lists of one length, got {quoted(value)}") from None
    if table.dtype == object:
        if not all(each is None or type(each) in (int, float) for each in table.flat):
            raise _Unfit(f"{key}: expected numbers, got {quoted(value)}")
        try:
            table = table.astype(np.float64)
        except OverflowError:
            raise _Unfit(f"{key}: expected numbers below 1.8e308, got {quoted(value)}") from None
    if table.dtype.kind not in "iuf" or table.size == 0:
        raise _Unfit(f"{key}: expected numbers, got {quoted(value)}")
    if table.ndim == 3 and table.dtype.kind in "iu" and table.min() >= 0 and table.max() <= 255:
        return table.astype(np.uint8)
    if table.ndim > 2:
        raise _Unfit(f"{key}: expected [C], [T][C], or [C][H][W] of integers from 0 to 255, got {list(table.shape)}")
    return table.astype(np.float64).reshape(1 if table.ndim < 2 else len(table), -1)
