"""The parts of an update, for the profiler of torch, and what a trace says about them.

The code of the method names its parts where they begin (`timed`). In a trace they are nested: within the dynamics this
rank starts exchanges and waits for them. `time_per_part` gives each part the time that no inner part has, so that the
times of all parts add up to the time of the recorded updates, from the first one's start to the last one's end.

    input            images and patches of the batch
    drive            d = W x + α V z
    dynamics         solving for the activities
    statistics       sums over the columns of the batch
    plasticity       change of the weights, and dead channels
    bound            bound of λmax(M)
    exchange         packing, starting and unpacking exchanges
    waiting          for other ranks, or for the device
    rest             anything else in an update
    encoding         a batch for the layer above, with `schedule: together`
    other layers     their updates meanwhile
    between updates  metrics, checkpoints, reports
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

PREFIX = "simmatch."
"""Of the names of ranges in a trace."""

UPDATE, REST, BETWEEN = "update", "rest", "between updates"
ENCODING, OTHERS = "encoding", "other layers"
"""Ranges whose inner parts are not told apart."""

PARTS = (
    "input", "drive", "dynamics", "statistics", "plasticity", "bound", "exchange", "waiting", REST, ENCODING,
    OTHERS, BETWEEN,
)  # fmt: skip

_NO_RANGE = nullcontext()


def recording() -> bool:
    """Whether a profiler of torch records this thread.

    The replay of a CUDA graph has no ranges, so an update that is recorded must not be replayed.

    >>> recording()
    False
    """
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def timed(name: str) -> AbstractContextManager[Any]:
    """A range of a trace in which one part of an update runs; it does nothing, in 0.2 µs, unless a profiler records.

    >>> with timed("drive"):
    ...     torch.ones(3) @ torch.ones(3)
    tensor(3.)
    """
    return torch.profiler.record_function(PREFIX + name) if recording() else _NO_RANGE


@dataclass(frozen=True)
class PartTime:
    """Time of one part over all updates of a trace.

    Attributes
    ----------
    host_s: seconds of the thread that learns; inner parts are left out.
    device_s: seconds of the kernels and copies that it started on a device.
    count: number of ranges.

    >>> PartTime(host_s=0.2, device_s=0.0, count=20).host_s
    0.2
    """

    host_s: float
    device_s: float
    count: int


Event = Mapping[str, Any]
"""An event of a Chrome trace; times in microseconds."""


def time_per_part(events: Sequence[Event]) -> dict[str, PartTime]:
    """The time of every part, from the events of a Chrome trace in which `timed("update")` encloses every update.

    Waits for a device, which CUDA's events show, count as waiting. Kernels belong to the part in which they were
    started.

    >>> update = {"cat": "user_annotation", "name": "simmatch.update", "tid": 1, "ts": 0.0, "dur": 5e6}
    >>> dynamics = {"cat": "user_annotation", "name": "simmatch.dynamics", "tid": 1, "ts": 1e6, "dur": 3e6}
    >>> {name: time.host_s for name, time in time_per_part([update, dynamics]).items() if time.count}
    {'dynamics': 3.0, 'rest': 2.0}
    """
    ranges = [event for event in events if _is_range(event)]
    updates = [event for event in ranges if event["name"] == PREFIX + UPDATE]
    if not updates:
        return {name: PartTime(0.0, 0.0, 0) for name in PARTS}
    thread, first = updates[0]["tid"], min(event["ts"] for event in updates)
    last = max(event["ts"] + event["dur"] for event in updates)
    waits = [event for event in events if _is_launch(event) and "Synchronize" in event["name"]]
    spans = [
        (event["ts"], event["ts"] + event["dur"], _part_of(event))
        for event in (*ranges, *waits)
        if event["tid"] == thread and first <= event["ts"] < last
    ]
    spans = _outside(spans)
    segments = _innermost(spans, first, last)
    host, device, count = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    for (start, name), (stop, _) in pairwise([*segments, (last, "")]):
        host[name] += stop - start
    for _, _, name in spans:
        count[name] += 1
    starts = [start for start, _ in segments]
    for launched, duration in _device_work(events, thread):
        if first <= launched <= last:
            device[segments[bisect_right(starts, launched) - 1][1]] += duration
    return {name: PartTime(host[name] * 1e-6, device[name] * 1e-6, int(count[name])) for name in PARTS}


def longest_kernels(events: Iterable[Event], most: int = 12) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of the kernels and copies of a device, the longest first.

    >>> longest_kernels([{"cat": "kernel", "name": "gemm", "dur": 5e5}, {"cat": "kernel", "name": "gemm", "dur": 5e5}])
    [('gemm', 2, 1.0)]
    """
    totals: dict[str, tuple[int, float]] = {}
    for event in filter(_is_device_work, events):
        calls, seconds = totals.get(event["name"], (0, 0.0))
        totals[event["name"]] = calls + 1, seconds + event["dur"] * 1e-6
    rows = [(name, *total) for name, total in totals.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def _outside(spans: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The spans without those inside of `ENCODING` and `OTHERS`."""
    kept, until = [], -math.inf
    for start, stop, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= until:
            kept.append((start, stop, name))
            until = stop if name in (ENCODING, OTHERS) else until
    return kept


def _innermost(spans: list[tuple[float, float, str]], first: float, last: float) -> list[tuple[float, str]]:
    """From when on which part is the innermost one: (start, part), in order of time, from `first` on."""
    segments, enclosing = [(first, BETWEEN)], [(last, BETWEEN)]
    for start, stop, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while len(enclosing) > 1 and enclosing[-1][0] <= start:
            ended, _ = enclosing.pop()
            segments.append((ended, enclosing[-1][1]))
        segments.append((start, name))
        enclosing.append((min(stop, enclosing[-1][0]), name))
    while len(enclosing) > 1:
        ended, _ = enclosing.pop()
        segments.append((ended, enclosing[-1][1]))
    return segments


def _device_work(events: Iterable[Event], thread: Any) -> list[tuple[float, float]]:
    """(time of the start by this thread, duration) of kernels and copies, joined by their correlation number."""
    launches, work = {}, []
    for event in events:
        if _is_launch(event) and event["tid"] == thread:
            launches[event.get("args", {}).get("correlation")] = event["ts"]
        elif _is_device_work(event):
            work.append(event)
    found = ((launches.get(event.get("args", {}).get("correlation")), event["dur"]) for event in work)
    return [(launched, duration) for launched, duration in found if launched is not None]


def _is_range(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and str(event.get("name")).startswith(PREFIX)


def _is_launch(event: Event) -> bool:
    return event.get("cat") in ("cuda_runtime", "cuda_driver")


def _is_device_work(event: Event) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _part_of(event: Event) -> str:
    if _is_launch(event):
        return "waiting"
    name: str = event["name"].removeprefix(PREFIX)
    return REST if name == UPDATE else name
