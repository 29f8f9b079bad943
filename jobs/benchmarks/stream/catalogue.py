"""The streams of the benchmark, and the rows that each of them is learnt by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from jobs.benchmarks.stream import image_rows, signal_rows
from jobs.benchmarks.stream.bearings import bearings
from jobs.benchmarks.stream.electricity import electricity
from jobs.benchmarks.stream.images import corrupted_fashion_mnist, rotating_fashion_mnist, split_fashion_mnist
from jobs.benchmarks.stream.rows import Kind
from jobs.benchmarks.stream.streams import Labelling, Stream


@dataclass(frozen=True)
class Entry:
    """A stream of the benchmark.

    Attributes
    ----------
    make: (folder of the data, quick) → the stream.
    rows: name → how it is made; the first is ours.
    labellings: which labels are given, and when.
    compared: more rows whose lead over all others is shown.
    """

    make: Callable[[Path, bool], Stream]
    rows: Mapping[str, Kind]
    labellings: Sequence[Labelling]
    compared: Sequence[str] = ()


def _bearings(classes: str, folder: Path, quick: bool) -> Stream:
    return bearings(folder, classes, quick=quick)


STREAMS: Mapping[str, Entry] = MappingProxyType(
    {
        f"bearings-{classes}": Entry(
            partial(_bearings, classes),
            signal_rows.BEARINGS,
            [Labelling(share, delay) for delay in (0, 500) for share in (0.01, 0.05, 1.0)],
        )
        for classes in ("types", "faults")
    }
    | {
        "electricity": Entry(
            lambda folder, quick: electricity(folder, quick=quick),
            signal_rows.ELECTRICITY,
            [Labelling(share) for share in (0.01, 1.0)],
        ),
        "split-fashion-mnist": Entry(
            lambda folder, quick: split_fashion_mnist(quick=quick),
            image_rows.SPLIT_ROWS,
            [Labelling()],
            ("similarity matching, frozen",),
        ),
        "rotating-fashion-mnist": Entry(
            lambda folder, quick: rotating_fashion_mnist(quick=quick),
            image_rows.ROTATING_ROWS,
            [Labelling()],
        ),
        "corrupted-fashion-mnist": Entry(
            lambda folder, quick: corrupted_fashion_mnist(quick=quick),
            image_rows.CORRUPTED_ROWS,
            [Labelling()],
        ),
    }
)
"""By the names of `--streams`."""
