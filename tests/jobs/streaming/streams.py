"""Streams for tests: a source that is a list, small configurations, and records that tell their class."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.streaming.config import StreamConfig, parse_stream
from jobs.streaming.journal import list_segments, read_entries
from jobs.streaming.outcome import Outcome, Usage
from jobs.streaming.records import Delivery, Fault, LateLabel, Record

Item = Record | LateLabel | Fault


def waves(count: int, *, seed: int = 0, labelled: float = 1.0, length: int = 16) -> list[Item]:
    """Windows of one of two frequencies, `labelled` of them with their class; the others get it some records later."""
    draw = np.random.default_rng(seed)
    items: list[tuple[float, Item]] = []
    for number in range(count):
        kind = int(draw.integers(2))
        wave = np.sin((1 + 2 * kind) * np.arange(length) + 6 * draw.random()) + 0.1 * draw.standard_normal(length)
        known = draw.random() < labelled
        name = f"r{number}"
        label = "ab"[kind]
        items.append((number, Record(name, float(number), wave[:, None], label if known else None)))
        if not known:
            items.append((number + 20 * draw.random(), LateLabel(name, label)))
    return [item for _, item in sorted(items, key=lambda pair: pair[0])]


def small(**changes: Any) -> StreamConfig:
    """A configuration for `waves`."""
    layer = {"out_channels": 8, "kernel_size": [1, 8], "stride": [1, 4], "pool": [1, 1]}
    values: dict[str, Any] = {
        "name": "waves",
        "source": {"lines": {"path": "unused.jsonl"}},
        "data": {"calibrate": 20},
        "model": {"layers": [layer]},
        "batch_size": 8,
        "max_wait_s": 0.05,
        "journal": {"sync_ms": 20.0, "segment_bytes": 4096},
        "snapshot": {"every_batches": 4},
        "tracking": {"enabled": False},
    }
    return parse_stream({**values, **changes})


class ListSource:
    """Delivers items until all are acknowledged; what was not acknowledged comes again, and some of the rest as well.

    Parameters
    ----------
    items: to deliver.
    acknowledged: indices of items that need not come; shared between processes of a test.
    shuffle: draws where deliveries come again or change places with their neighbours; None: neither.
    """

    def __init__(self, items: Sequence[Item], acknowledged: set[int], shuffle: random.Random | None = None) -> None:
        self._items, self._acknowledged = items, acknowledged
        order = [index for index in range(len(items)) if index not in acknowledged]
        if shuffle is not None:
            again = shuffle.sample(sorted(acknowledged), min(len(acknowledged), 3))
            order = again + [each for index in order for each in [index] * (1 + (shuffle.random() < 0.1))]
            for place in range(1, len(order)):
                if shuffle.random() < 0.1:
                    order[place - 1], order[place] = order[place], order[place - 1]
        self._order = order

    @property
    def ended(self) -> bool:
        return not self._order

    def poll(self, limit: int, wait_s: float) -> list[Delivery]:
        now, self._order = self._order[:limit], self._order[limit:]
        return [Delivery(self._items[index], {"source": "list", "at": index}, index) for index in now]

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._acknowledged.update(delivery.receipt for delivery in deliveries)

    def needs(self, key: str) -> bool:
        return True

    def close(self) -> None:
        pass


class Notes:
    """Collects outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.usages: list[Usage] = []

    def add(self, outcome: Outcome, usage: Usage) -> None:
        self.outcomes.append(outcome)
        self.usages.append(usage)

    def idle(self) -> None:
        pass

    def sync(self) -> None:
        pass


def journalled(run_dir: Path) -> list[Item]:
    """The records, labels and faults of a run's journal."""
    entries = read_entries(list_segments(run_dir / "journal"))
    return [entry.item for _, entry in entries if isinstance(entry.item, Record | LateLabel | Fault)]


def named(items: Sequence[Item]) -> Mapping[str, bytes | str]:
    """What identifies items, and what they hold."""
    return {
        f"record {item.id}" if isinstance(item, Record) else f"label {item.id}": item.values.tobytes()
        if isinstance(item, Record)
        else item.label
        for item in items
        if not isinstance(item, Fault)
    }


def wait_until(condition: Callable[[], object], limit_s: float) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not reached within {limit_s:g} s"
        time.sleep(0.02)
