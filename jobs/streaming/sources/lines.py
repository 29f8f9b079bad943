"""Records from a file that grows: JSON, or CSV with a line of names, one record a line."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from jobs.streaming.records import Delivery, Fault, LateLabel, Position, Record
from jobs.streaming.sources.fields import Place, RecordKeys, from_fields, from_json
from jobs.streaming.sources.tail import Line, Tail
from simmatch.config import ConfigError, NonNegativeFloat
from simmatch.documents import quoted, shortened

LOOK_S = 0.05
"""Pause between two looks at a file that does not grow."""

MARK = b"\xef\xbb\xbf"
"""With which some programs begin a file in UTF-8."""


class LinesConfig(RecordKeys):
    """A file that grows. It may be renamed and made anew, or copied and truncated, as by logrotate.

    >>> LinesConfig(path="log.jsonl").kind
    'json'
    >>> LinesConfig(path="log.csv", columns=("x", "y"), id_field=None).kind
    'csv'
    """

    path: str
    """The file. It may come later."""

    format: Literal["auto", "json", "csv"] = "auto"
    """`json`: an object a line. `csv`: a line of names, then values. `auto`: `csv` if `.csv` is in the name of the
    file."""

    delimiter: str = ","
    """Between two fields of CSV."""

    follow: bool = True
    """False: the source ends with the file. It is read once, as for a test."""

    settle_s: NonNegativeFloat = 1.0
    """A file that was renamed is left for the next one when nothing has been written to it for so long."""

    @property
    def kind(self) -> str:
        """`json` or `csv`."""
        if self.format != "auto":
            return self.format
        return "csv" if ".csv" in os.path.basename(self.path).lower() else "json"

    def check(self) -> None:
        """Before a stream begins.

        Raises
        ------
        ConfigError
            There is no such file, and it is not waited for; or it is a folder.
        """
        if os.path.isdir(os.path.expanduser(self.path)):
            raise ConfigError(f"source.lines.path: expected a file, got {self.path}, a folder; see source.folder")
        if not self.follow and not os.path.exists(os.path.expanduser(self.path)):
            raise ConfigError(f"source.lines.path: expected a file, got {self.path}, which does not exist")

    @model_validator(mode="after")
    def _complete(self) -> LinesConfig:
        if not self.path:
            raise ValueError("expected a file as path, got nothing")
        if self.kind == "csv" and self.columns is None:
            raise ValueError("expected the names of the channels as columns, for CSV, got none")
        if len(self.delimiter) != 1 or self.delimiter in '\r\n"':
            raise ValueError(f"expected one character as delimiter, got {self.delimiter!r}")
        return self


class LinesSource:
    """See `jobs.streaming.records.Source`.

    Parameters
    ----------
    positions: the last one of each key.
    tell: is given lines for people.
    """

    def __init__(self, config: LinesConfig, positions: Mapping[str, Position], tell: Callable[[str], None]) -> None:
        self._key = os.path.basename(config.path)
        place = positions.get(self._key)
        self._tail = Tail(
            os.path.abspath(os.path.expanduser(config.path)), place, longest=config.max_record_bytes,
            follow=config.follow, settle_s=config.settle_s, tell=tell,
        )  # fmt: skip
        self._reader = LineReader(config, self._key, place, tell)

    @property
    def ended(self) -> bool:
        return self._tail.ended

    def poll(self, limit: int, wait_s: float) -> list[Delivery]:
        deadline = time.monotonic() + wait_s
        while True:
            lines = self._tail.read(limit)
            found = [each for line in lines if (each := self._reader.delivery(line, self._tail)) is not None]
            left_s = deadline - time.monotonic()
            if found or self.ended or (left_s <= 0 and not lines):
                return found
            if not lines:
                time.sleep(min(left_s, LOOK_S))

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Positions say it all."""

    def needs(self, key: str) -> bool:
        return key == self._key

    def close(self) -> None:
        self._tail.close()


class LineReader:
    """Makes deliveries from lines, and remembers the names of the columns.

    Parameters
    ----------
    key: of the positions.
    place: the last position; None: none.
    """

    def __init__(self, config: LinesConfig, key: str, place: Position | None, tell: Callable[[str], None]) -> None:
        self._config, self._key, self._tell = config, key, tell
        self._header_at: int | None = place["header"] if place is not None else None
        self._names: list[str] | None = None
        self._inode: int | None = None
        self._line = place["line"] if place is not None else 0
        self._number = place["number"] if place is not None else 0

    def delivery(self, line: Line, file: Tail) -> Delivery | None:
        """What a line holds; None: nothing, or names."""
        if line.start == 0:
            self._line, self._names, self._header_at = 0, None, None
        elif self._inode is None and self._header_at is not None:  # after a restart
            names = file.first_line(self._header_at)
            self._names = self._fields(names.removeprefix(MARK).decode(errors="replace")) if names else None
        self._inode = line.inode
        self._line += 1
        if not line.raw.strip() and line.size <= len(line.raw) + 1:
            return None
        item = self._item(line)
        return None if item is None else Delivery(item, self._position(line))

    def _position(self, line: Line) -> dict[str, Any]:
        place = {"inode": line.inode, "offset": line.end, "head": list(line.head)}
        return {"source": self._key, **place, "header": self._header_at, "line": self._line, "number": self._number}

    def _item(self, line: Line) -> Record | LateLabel | Fault | None:
        keys, where = self._config, f"{shortened(self._key)}, line {self._line}"
        if line.size > keys.max_record_bytes:
            reason = f"expected at most {keys.max_record_bytes} bytes in a line, got {line.size}"
            return Fault(reason, line.raw, where)
        place = Place(where, f"{self._key}/{self._number}", float(self._number))
        raw = line.raw.removeprefix(MARK) if line.start == 0 else line.raw
        item = from_json(raw, keys, place) if keys.kind == "json" else self._row(raw, line, place)
        if isinstance(item, Record):
            self._number += 1
        return item

    def _row(self, raw: bytes, line: Line, place: Place) -> Record | LateLabel | Fault | None:
        """A line of CSV."""
        try:
            fields = self._fields(raw.decode())
        except UnicodeDecodeError as error:
            return Fault(f"expected UTF-8, got byte 0x{raw[error.start]:02x}", raw, place.name)
        if fields is None:
            return Fault("expected the fields of one line of CSV, got a quote without its end", raw, place.name)
        needed = [*(self._config.columns or ()), self._config.id_field, self._config.time_field]
        absent = [name for name in needed if name is not None and name not in fields]
        if not absent and len(set(fields)) == len(fields):  # the first line, or the names again after a restart
            self._names, self._header_at = fields, line.start
            return None
        if line.start == 0:
            fault = f"columns {', '.join(map(quoted, absent))}" if absent else "each column once"
            reason = f"expected {fault} in the line of names, got {shortened(', '.join(fields))}"
            self._tell(f"{place.name}: {reason}; the lines below are set aside")
            return Fault(reason, raw, place.name)
        if self._names is None:
            return Fault("expected a line of names before it, which has all columns, got none", raw, place.name)
        if len(fields) != len(self._names):
            return Fault(f"expected {len(self._names)} fields, got {len(fields)}", raw, place.name)
        return from_fields(dict(zip(self._names, fields, strict=True)), self._config, place, raw)

    def _fields(self, text: str) -> list[str] | None:
        """The fields of a line of CSV; None: it is none."""
        try:
            rows = list(csv.reader([text], delimiter=self._config.delimiter, skipinitialspace=True, strict=True))
        except csv.Error:
            return None
        return [field.strip() for field in rows[0]] if len(rows) == 1 else None
