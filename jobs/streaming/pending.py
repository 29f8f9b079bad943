"""Windows that wait for their labels, and labels that came before their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Held:
    """The windows that ended in one record, and what was predicted for them.

    Attributes
    ----------
    number: of the record.
    windows: [n, C, H, W].
    predictions: int64 [n, P]: for each candidate the class its readout and its V named, −1 where none.
    """

    number: int
    windows: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class Early:
    """A label whose record has not come. `number`: of the records so far; `entry`: its own in the journal."""

    label: str
    number: int
    entry: int


class Pending:
    """Both, each of the last `horizon` records, and at most as many labels.

    Parameters
    ----------
    horizon: in records.
    predictions: P, their number for each window.
    """

    def __init__(self, horizon: int, predictions: int) -> None:
        self._horizon, self._predictions = horizon, predictions
        self._held: dict[str, Held] = {}
        self._early: dict[str, Early] = {}

    def hold(self, name: str, held: Held) -> None:
        """Keep the windows of a record without a label; some may have come before, and these waited to be filled."""
        before = self._held.get(name)
        if before is not None:
            windows = torch.cat([before.windows, held.windows])
            held = Held(held.number, windows, torch.cat([before.predictions, held.predictions]))
        self._held[name] = held

    def label(self, name: str, early: Early) -> Held | None:
        """The windows that a label is for, which are let go; None: the label waits for its record."""
        held = self._held.pop(name, None)
        if held is None:
            self._early[name] = early
        return held

    def of_record(self, name: str) -> Early | None:
        """The label that has come before its record."""
        return self._early.pop(name, None)

    def expire(self, number: int) -> int:
        """Forget what is older than the horizon, once `number` records have come; returns the labels forgotten."""
        oldest = number - self._horizon
        for name in _before(self._held, oldest):
            del self._held[name]
        gone = _before(self._early, oldest)
        gone += list(self._early)[len(gone) : len(self._early) - self._horizon]
        for name in gone:
            del self._early[name]
        return len(gone)

    @property
    def nbytes(self) -> int:
        """Size of the windows and predictions that are kept."""
        return sum(held.windows.nbytes + held.predictions.nbytes for held in self._held.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values."""
        held = list(self._held.values())
        tensors = {
            "number": torch.tensor([one.number for one in held], dtype=torch.int64),
            "count": torch.tensor([len(one.windows) for one in held], dtype=torch.int64),
            "predictions": torch.cat([one.predictions for one in held])
            if held
            else torch.empty(0, self._predictions, dtype=torch.int64),
        }
        if held:
            tensors["windows"] = torch.cat([one.windows for one in held])
        early = [[name, one.label, one.number, one.entry] for name, one in self._early.items()]
        return tensors, {"held": list(self._held), "early": early}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """As it was when the state was taken."""
        counts = tensors["count"].tolist()
        windows = torch.split(tensors["windows"], counts) if counts else ()
        predictions = torch.split(tensors["predictions"], counts) if counts else ()
        rows = zip(tensors["number"].tolist(), windows, predictions, strict=True)
        self._held = {
            name: Held(number, x.clone(), predicted.clone())
            for name, (number, x, predicted) in zip(plain["held"], rows, strict=True)
        }
        self._early = {name: Early(label, number, entry) for name, label, number, entry in plain["early"]}


def _before(kept: Mapping[str, Held | Early], oldest: int) -> list[str]:
    """The names of those with a smaller number; they are in the order of their numbers."""
    names: list[str] = []
    for name, one in kept.items():
        if one.number >= oldest:
            break
        names.append(name)
    return names


def columns(candidates: Sequence[str]) -> dict[str, slice]:
    """Where the predictions of each candidate are: of its readout, then of its V.

    >>> columns(["main", "fast"])["fast"]
    slice(2, 4, None)
    """
    return {name: slice(2 * index, 2 * index + 2) for index, name in enumerate(candidates)}
