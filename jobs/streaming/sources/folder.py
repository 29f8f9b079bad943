"""Records from a folder that files arrive in: recordings, images, and lines of JSON."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from jobs.streaming.records import Delivery, Fault, LateLabel, Position, Record, SourceError
from jobs.streaming.sources.arrivals import LOOK_S, Arrival, Arrivals
from jobs.streaming.sources.fields import LONGEST_NAME, RecordKeys
from jobs.streaming.sources.lines import LineReader, LinesConfig
from jobs.streaming.sources.tail import Tail, inode_with
from simmatch.config import NonNegativeFloat, PositiveInt
from simmatch.data.config import ClassPattern, DataConfig, ImageSize
from simmatch.data.decoding import SUFFIXES, ImagePolicy, decode
from simmatch.data.formats import DataError
from simmatch.data.recordings import FORMATS, Recording, class_of
from simmatch.data.series import OpenRecordings
from simmatch.documents import quoted, shortened

LINES = (".jsonl", ".ndjson", ".json")
"""Endings of files of lines of JSON."""

KNOWN = (*LINES, *SUFFIXES, *(ending for endings, _ in FORMATS.values() for ending in endings))
"""Endings of the files that are read."""

MOST_BYTES = 2**28
"""Of the samples of one record, as float64."""

LONGEST_ID = 120
"""Characters of the name of a file in an id; of a longer one its end and a hash stand there."""


class FolderConfig(RecordKeys):
    """A folder that files arrive in, at any depth.

    Lines of JSON (`*.jsonl`) are records as those of a file that grows. A recording (`*.npy`, `*.npz`, `*.csv`,
    `*.csv.gz`, `*.ts`) is cut into records of `block` samples. An image is a record. Other files are left alone.

    >>> FolderConfig(path="incoming", done="read").order
    'name'
    """

    path: str
    """The folder. It may come later. Hidden files and folders, whose names begin with a dot, are left alone."""

    order: Literal["name", "time"] = "name"
    """Of files that are found at one look: by their names, or by the times of their last changes."""

    temporary: Annotated[tuple[str, ...], Field(strict=False)] = (".tmp", ".part", ".partial")
    """Endings of files that are still being written; they are read once they are renamed."""

    settle_s: NonNegativeFloat = 2.0
    """A file is complete when its size and time have not changed for so long."""

    follow: bool = True
    """False: the source ends with the files that are there."""

    done: str | None = None
    """A folder that files are moved to once all of their records are safe. None: they stay, and are remembered."""

    block: PositiveInt | None = 1024
    """Samples of a record of a recording. None: each recording is one record, for `data.window: null`."""

    max_file_bytes: PositiveInt = 2**30
    """A larger file is set aside, but for lines of JSON and `*.npy`, of which only a part is held at a time."""

    label_pattern: ClassPattern = None
    """Regular expression that is searched for in the path of a recording or an image in the folder, for example
    `worn/monday.npy` or `run.npz/array`; its first group is the class. None: the first folder of the path, if there is
    one. A column `label_field` of CSV and the class in a `.ts` file come first."""

    size: ImageSize = None
    """Height and width of images, see `DataConfig.size`."""

    channels: Literal[1, 3] | None = None
    """Of images, see `DataConfig.channels`."""

    @model_validator(mode="after")
    def _places(self) -> FolderConfig:
        if not self.path:
            raise ValueError("expected a folder as path, got nothing")
        if self.done is not None and not self.done:
            raise ValueError("expected a folder as done, got nothing")
        return self


class FolderSource:
    """See `jobs.streaming.records.Source`.

    Parameters
    ----------
    positions: of the files that were read, or begun.
    period_s: from sample to sample, of recordings without times. None: all samples of a block have one time.
    tell: is given lines for people.
    """

    def __init__(
        self,
        config: FolderConfig,
        positions: Mapping[str, Position],
        tell: Callable[[str], None],
        period_s: float | None = None,
    ) -> None:
        self._config, self._tell, self._period_s = config, tell, period_s
        self._folder = os.path.abspath(os.path.expanduser(config.path))
        self._done = config.done and os.path.abspath(os.path.join(self._folder, os.path.expanduser(config.done)))
        self._positions = dict(positions)
        self._clock = max((float(each["time"]) for each in positions.values()), default=0.0)
        """Time of the last sample of a file that has no times itself; it does not go back."""
        self._data = DataConfig(
            path=self._folder, format="numpy", columns=config.columns, time_column=config.time_field, period=period_s,
            label_column=config.label_field or "", label_pattern=config.label_pattern,
        )  # fmt: skip
        self._policy = ImagePolicy.of(DataConfig(path=self._folder, size=config.size, channels=config.channels))
        self._ready: deque[Arrival] = deque()
        self._present: Iterator[Delivery] | None = None
        self._told = False
        self._arrivals = Arrivals(
            self._folder, order=config.order, settle_s=config.settle_s, left_out=self._left_out, follow=config.follow,
            tell=tell,
        )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._arrivals.over and not self._ready and self._present is None

    def poll(self, limit: int, wait_s: float) -> list[Delivery]:
        deadline = time.monotonic() + wait_s
        found: list[Delivery] = []
        while len(found) < limit and not self.ended:
            if self._present is not None:
                if (delivery := next(self._present, None)) is not None:
                    found.append(delivery)
                else:
                    self._present = None
            elif self._ready:
                self._present = self._of_file(self._ready.popleft())
            elif found or not self._wait(deadline):
                break
        return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.position is not None and delivery.position["done"]:
                self._positions[delivery.position["source"]] = delivery.position
                self._move(delivery.position["source"])

    def needs(self, key: str) -> bool:
        return os.path.lexists(os.path.join(self._folder, key))

    def close(self) -> None:
        self._present = None

    def _wait(self, deadline: float) -> bool:
        """Look for files; False: the time is over."""
        try:
            self._ready.extend(self._arrivals.look())
        except DataError as error:
            raise SourceError(f"source.folder.path: {error}") from None
        if self._ready or self._arrivals.over:
            return True
        self._positions = {key: place for key, place in self._positions.items() if self.needs(key)}
        left_s = deadline - time.monotonic()
        if left_s > 0:
            time.sleep(min(left_s, LOOK_S))
        return left_s > 0

    def _left_out(self, name: str) -> bool:
        path, lower = os.path.join(self._folder, name), name.lower()
        inside = self._done is not None and os.path.commonpath([path, self._done]) == self._done
        return inside or lower.endswith(self._config.temporary) or not lower.endswith(KNOWN)

    def _move(self, name: str) -> None:
        """Put a file that was read where the configuration says."""
        if self._done is None:
            return
        target = os.path.join(self._done, name)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.move(os.path.join(self._folder, name), target)
        except FileNotFoundError:
            pass  # somebody else has taken it
        except OSError as error:
            if not self._told:
                self._told = True
                reason = error.strerror or str(error)
                self._tell(
                    f"source.folder.done: {shortened(name)} cannot be moved: {reason}; it stays, and is remembered"
                )

    def _of_file(self, arrival: Arrival) -> Iterator[Delivery]:
        """The deliveries of a file; the position of the last one says that it is done."""
        before = self._positions.get(arrival.name)
        now = {"source": arrival.name, "size": arrival.size, "changed_ns": arrival.changed_ns}
        unchanged = before is not None and all(before[key] == value for key, value in now.items())
        if before is not None and unchanged and before["done"]:
            self._move(arrival.name)
            return
        if arrival.name.lower().endswith(LINES):
            path = os.path.join(self._folder, arrival.name)
            place = before if before is not None and "offset" in before and inode_with(path, before) else None
            items = self._lines(arrival, place)
        else:
            place = before if unchanged else None
            items = self._parts(arrival, place["next"] if place is not None else 0)
        held: tuple[Record | LateLabel | Fault, Mapping[str, Any]] | None = None
        try:
            for each in items:
                if held is not None:
                    yield Delivery(held[0], {**held[1], **now, "done": False})
                held = each
        except ImportError as error:
            raise SourceError(f"{shortened(arrival.name)}: {error}") from None
        except (DataError, MemoryError, OSError) as error:
            if held is not None:
                yield Delivery(held[0], {**held[1], **now, "done": False})
            held = self._unreadable(arrival, str(error) or "larger than the memory"), {"next": 0, "time": self._clock}
        if held is None and place is None:
            held = self._unreadable(arrival, "expected records, found none"), {"next": 0, "time": self._clock}
        if held is not None:
            yield Delivery(held[0], {**held[1], **now, "done": True})

    def _unreadable(self, arrival: Arrival, reason: str) -> Fault:
        name = shortened(arrival.name, LONGEST_ID)
        reason = shortened(reason if reason.startswith(name) else f"{name}: {reason}")
        self._tell(f"{reason}; the file is set aside")
        return Fault(reason, b"", name)

    def _lines(self, arrival: Arrival, place: Position | None) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Lines of JSON, from a place on."""
        config = self._config
        keys = {name: getattr(config, name) for name in RecordKeys.model_fields}
        lines = LinesConfig(path=arrival.name, format="json", **keys)
        reader = LineReader(lines, arrival.name, place, self._tell)
        path = os.path.join(self._folder, arrival.name)
        tail = Tail(path, place, longest=config.max_record_bytes, follow=False, tell=self._tell)
        try:
            while not tail.ended:
                for line in tail.read(1):
                    if (delivery := reader.delivery(line, tail)) is not None:
                        assert delivery.position is not None
                        yield delivery.item, {**delivery.position, "time": self._clock}
        finally:
            tail.close()

    def _parts(self, arrival: Arrival, first: int) -> Iterator[tuple[Record, Mapping[str, Any]]]:
        """An image, or the blocks of recordings, from one of these numbers on."""
        path, changed = os.path.join(self._folder, arrival.name), arrival.changed_ns / 1e9
        lower = arrival.name.lower()
        if arrival.size > self._config.max_file_bytes and not lower.endswith(".npy"):
            raise DataError(f"expected at most {self._config.max_file_bytes:,} bytes, got {arrival.size:,}")
        if lower.endswith(SUFFIXES):
            with open(path, "rb") as file:
                pixels = decode(file.read(self._config.max_file_bytes), self._policy)
            self._clock = max(self._clock, changed)
            label = _name(class_of(arrival.name, self._data))
            record = Record(_id(arrival.name), self._clock, pixels, label, begins=True)
            yield record, {"next": 1, "time": self._clock}
            return
        if self._config.columns is None and lower.endswith((".csv", ".csv.gz")):
            raise DataError("expected the names of the channels in source.folder.columns, for CSV, got none")
        number, read = 0, next(read for endings, read in FORMATS.values() if lower.endswith(endings))
        for recording in read(path, arrival.name, self._data, OpenRecordings()):
            labels = recording.labels
            if labels is None:
                label = recording.label if self._data.label_pattern is None else None
                labels = np.array([label or class_of(recording.name, self._data) or ""])
            for start, stop, begins in _blocks(recording, self._config.block):
                number += 1
                if number > first:
                    label = _name(str(labels[min(stop, len(labels)) - 1]))
                    record = self._block(recording, start, stop, changed if begins else -np.inf)
                    record = replace(record, label=label, begins=begins)
                    yield record, {"next": number, "time": self._clock}

    def _block(self, recording: Recording, start: int, stop: int, least_s: float) -> Record:
        """Samples of a recording; without times of its own they follow what was before, at `least_s` or later."""
        size = 8 * (stop - start) * recording.series.shape[1]
        if size > MOST_BYTES:
            raise DataError(f"expected at most {MOST_BYTES:,} bytes in a record, got {size:,}; see source.folder.block")
        period_s = self._period_s or 0.0
        name = _id(recording.name) if self._config.block is None else f"{_id(recording.name)}/{start}"
        values = recording.series.read(start, stop).astype(np.float64)
        if recording.times is not None:
            return Record(name, float(recording.times[start]), values)
        time_s = max(self._clock + period_s, least_s)
        self._clock = time_s + (stop - start - 1) * period_s
        return Record(name, time_s, values)


def _blocks(recording: Recording, block: int | None) -> Iterator[tuple[int, int, bool]]:
    """First sample, the one behind the last, and whether a gap or nothing is before it; of one class each."""
    length, gaps = recording.series.shape[0], [int(gap) for gap in recording.gaps]
    if block is None:
        if gaps:
            raise DataError(f"{shortened(recording.name)}: expected no gap in time with block: null, got {len(gaps)}")
        yield 0, length, True
        return
    labels = recording.labels
    turns = [] if labels is None else (np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()
    begun, edges = {0, *gaps}, sorted({0, *gaps, *turns, length})
    for start, stop in pairwise(edges):
        for first in range(start, stop, block):
            yield first, min(first + block, stop), first in begun


def _id(name: str) -> str:
    """The name of a file or a recording, as it can be part of an id."""
    if name.isprintable() and len(name) <= LONGEST_ID:
        return name
    digest = sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{shortened(name, LONGEST_ID)}#{digest}"


def _name(label: str | None) -> str | None:
    """A label, if it is one that can be printed."""
    if label is not None and (not label.isprintable() or len(label) > LONGEST_NAME):
        raise DataError(f"expected a class of at most {LONGEST_NAME} printable characters, got {quoted(label)}")
    return label or None
