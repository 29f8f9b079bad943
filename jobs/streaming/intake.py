"""From the items of a batch to windows with labels: cutting, classes, labels by id, and what is set aside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.streaming.config import StreamDataConfig
from jobs.streaming.ledger import Batch
from jobs.streaming.outcome import SetAside
from jobs.streaming.pending import Early, Held, Pending
from jobs.streaming.records import Fault, LateLabel, Record
from simmatch.config import ConfigError
from simmatch.data.cutter import Cutter
from simmatch.data.windows import WindowShape, scaled
from simmatch.documents import listed
from simmatch.labels import UNLABELLED
from simmatch.online.state import joined, part_of

MOST_NAMED = 20
"""Classes in a message."""

MOST_VALUE = 1e12
"""Largest value of a window, scaled: float32 has room for what is computed from it, and learnt."""

LONGEST_RAW = 200
"""Characters of a record's own values that are kept where it is set aside."""


class Unusable(Exception):
    """A record or a label that nothing can be learnt from; the message says why."""


@dataclass
class Origin:
    """A record that windows may still end in: number of its first sample in its group, and what answers need."""

    first: int
    id: str
    number: int
    time: float
    label: int


@dataclass(eq=False)
class _Group:
    """One machine: its cutter, the time of its newest record, and the records its next windows may end in.

    broken: a record was set aside, so that what follows does not follow on what was before.
    """

    cutter: Cutter
    time: float = -math.inf
    broken: bool = False
    origins: list[Origin] = field(default_factory=list)


@dataclass(eq=False)
class Window:
    """One window, and the record that it ends in. `label`: index of its class, or `UNLABELLED`."""

    x: Tensor
    id: str
    number: int
    time: float
    group: str
    label: int


@dataclass(frozen=True, eq=False)
class Labelled:
    """Windows of an earlier record, and the label that has come."""

    held: Held
    label: int


@dataclass
class Taken:
    """What the items of a batch are."""

    windows: list[Window] = field(default_factory=list)
    labelled: list[Labelled] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    new_classes: list[tuple[str, int, float]] = field(default_factory=list)
    """Name, and number and time of the record at which it appeared."""
    records: int = 0
    came: int = 0
    """Labels, with a record or by its id."""
    unused: int = 0


class Intake:
    """A function of the journal, batch by batch.

    Parameters
    ----------
    config: how records become windows.
    pending: what waits for labels.
    fit: raises a ConfigError if the candidates cannot be made for windows [C, H, W].

    Attributes
    ----------
    classes: in the order of their indices.
    records, time: number of records so far, and time of the newest.
    set_aside: number of what was set aside so far.
    shape: [C, H, W] of a window, once one is known.
    """

    def __init__(self, config: StreamDataConfig, pending: Pending, fit: Callable[[list[int]], None]) -> None:
        self._config, self._pending, self._fit = config, pending, fit
        self.classes = list(config.classes)
        self._indices = {name: index for index, name in enumerate(self.classes)}
        self.records, self.set_aside, self.time = 0, 0, 0.0
        self.shape: list[int] | None = None
        self._schema: list[int] | None = None
        self._groups: dict[str, _Group] = {}

    def take(self, batch: Batch) -> Taken:
        """The windows and labels of a batch."""
        taken = Taken()
        for entry, item in batch.items:
            taken.came += isinstance(item, Record | LateLabel) and item.label is not None
            try:
                match item:
                    case Record():
                        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is looked for
                            self._record(item, taken)
                    case LateLabel():
                        self._label(item.id, Early(item.label, self.records, entry), taken)
                    case Fault():
                        raise Unusable(item.reason)
            except Unusable as error:
                if isinstance(item, Record) and item.group in self._groups:
                    self._groups[item.group].broken = True
                taken.set_aside.append(_set_aside(entry, item, str(error)))
        taken.unused += self._pending.expire(self.records)
        self.set_aside += len(taken.set_aside)
        return taken

    def _record(self, record: Record, taken: Taken) -> None:
        taken.records += 1
        self.records += 1
        self.time = record.time
        early = self._pending.of_record(record.id)
        self._check(record)
        name = record.label if record.label is not None or early is None else early.label
        label = UNLABELLED if name is None else self._class(name, taken)
        origin = Origin(0, record.id, self.records, record.time, label)
        whole = self._config.shape is None
        windows = [(self._whole(record.values), origin)] if whole else self._cut(record, origin)
        for x, ended in windows:
            if not bool((x.abs() <= MOST_VALUE).all()):
                raise Unusable(f"values: expected at most {MOST_VALUE:g} in a window, got more")
            if ended.label == UNLABELLED and (early := self._pending.of_record(ended.id)) is not None:
                ended.label = self._class(early.label, taken)  # it came while the window waited to be filled
            taken.windows.append(Window(x, ended.id, ended.number, ended.time, record.group, ended.label))
            self.shape = self.shape or list(x.shape)

    def _label(self, name: str, early: Early, taken: Taken) -> None:
        waiting = [window for window in taken.windows if window.id == name and window.label == UNLABELLED]
        if waiting:
            label = self._class(early.label, taken)
            for window in waiting:
                window.label = label
            return
        held = self._pending.label(name, early)
        if held is not None:
            taken.labelled.append(Labelled(held, self._class(early.label, taken)))

    def _class(self, name: str, taken: Taken) -> int:
        index = self._indices.get(name)
        if index is not None:
            return index
        if self._config.new_classes == "set_aside":
            raise Unusable(f"label: expected one of {listed(self.classes, MOST_NAMED)}, got {name!r}")
        if len(self.classes) >= self._config.most_classes:
            raise Unusable(f"label: expected at most data.most_classes={len(self.classes)}, got {name!r} as well")
        self.classes.append(name)
        self._indices[name] = len(self.classes) - 1
        taken.new_classes.append((name, self.records, self.time))
        return self._indices[name]

    def _check(self, record: Record) -> None:
        """Refuse another shape than that of the first record, and a first one that the candidates cannot be made
        for."""
        values = record.values
        image = values.ndim == 3
        if image and self._config.shape is not None:
            raise Unusable(
                f"values: expected samples to cut windows from, got an image of {_shown(list(values.shape))}"
            )
        whole = self._config.shape is None
        schema = list(values.shape) if whole else [values.shape[1]]
        if self._schema is None:
            try:
                if whole:
                    self._fit(schema if image else [schema[1], 1, schema[0]])
            except ConfigError as error:
                raise Unusable(f"values: expected a shape that the model fits, got {_shown(schema)}: {error}") from None
            self._schema = schema
        elif schema != self._schema:
            kind = "an image" if image else "a window [samples, channels]" if whole else "channels"
            raise Unusable(f"values: expected {kind} of {_shown(self._schema)} as before, got {_shown(schema)}")

    def _whole(self, values: np.ndarray[Any, Any]) -> Tensor:
        """A record that is an image, or a window."""
        if values.ndim == 3:
            return torch.from_numpy(values).float() / 255
        if not np.isfinite(values).all():
            raise Unusable("values: expected finite numbers in a record that is a window, got others")
        how = WindowShape(len(values), len(values), self._config.window_scale, self._config.window_floor)
        return torch.from_numpy(scaled(values.T[None], how)[0])[:, None]

    def _cut(self, record: Record, origin: Origin) -> list[tuple[Tensor, Origin]]:
        """The windows that are complete with a record of samples, and the records that they end in."""
        group = self._groups.get(record.group) or self._group(record.group)
        begins = record.begins or group.broken
        if record.time < group.time and not record.begins:
            raise Unusable(f"time: expected at least {group.time!r}, of the record before, got {record.time!r}")
        values, cutter, shape = record.values, group.cutter, self._config.shape
        assert shape is not None
        group.time, origin.first = record.time, cutter.samples
        cuts = cutter.end() if begins else []
        group.broken = False
        cuts += cutter.add(values, record.time + (self._config.period or 0.0) * np.arange(len(values)))
        group.origins.append(origin)
        ended = [(x, next(each for each in reversed(group.origins) if each.first <= last)) for x, last in cuts]
        while len(group.origins) > 1 and group.origins[1].first < cutter.samples - shape.hold:
            del group.origins[0]
        return ended

    def _group(self, name: str) -> _Group:
        if len(self._groups) >= self._config.most_groups:
            raise Unusable(f"group: expected at most data.most_groups={len(self._groups)}, got {name!r} as well")
        assert self._config.shape is not None
        assert self._schema is not None
        group = self._groups[name] = _Group(Cutter(self._config.shape, self._schema[0], self._config.period))
        return group

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values."""
        cutters = {f"cutters.{index}": group.cutter.state() for index, group in enumerate(self._groups.values())}
        groups = [
            [
                name,
                group.time if math.isfinite(group.time) else None,
                group.broken,
                [list(vars(each).values()) for each in group.origins],
            ]
            for name, group in self._groups.items()
        ]
        plain = {
            "classes": self.classes,
            "records": self.records,
            "set_aside": self.set_aside,
            "time": self.time,
            "shape": self.shape,
            "schema": self._schema,
            "groups": groups,
        }
        return joined(cutters), plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """As it was when the state was taken."""
        self.classes, self.records, self.time = list(plain["classes"]), plain["records"], plain["time"]
        self._indices = {name: index for index, name in enumerate(self.classes)}
        self.shape, self._schema, self.set_aside = plain["shape"], plain["schema"], plain["set_aside"]
        self._groups = {}
        for index, (name, time, broken, origins) in enumerate(plain["groups"]):
            group = self._group(name)
            group.time, group.broken = -math.inf if time is None else time, broken
            group.origins = [Origin(*each) for each in origins]
            group.cutter.restore(part_of(tensors, f"cutters.{index}"))


def _shown(sizes: list[int]) -> str:
    return " × ".join(map(str, sizes))


def _set_aside(entry: int, item: Record | LateLabel | Fault, reason: str) -> SetAside:
    match item:
        case Record():
            raw = repr(item.values.tolist() if item.values.size < 100 else item.values.shape)[:LONGEST_RAW]
            return SetAside(entry, item.id, reason, raw, item.group)
        case LateLabel():
            return SetAside(entry, item.id, reason, repr(item.label)[:LONGEST_RAW], "")
        case Fault():
            raw = item.raw if isinstance(item.raw, str) else item.raw.decode(errors="backslashreplace")
            return SetAside(entry, "", reason, raw, item.place)
