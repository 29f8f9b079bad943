"""Processor time of the parts of a stream on one thread, a record: layer, readout, novelty, drift.

Each part in batches of several sizes: what a batch costs whatever its size is seen in the small ones. Batches of one
round follow each other; rounds of all parts take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from jobs.benchmarks.timing import Spread
from jobs.reporting import Report
from simmatch.config import DynamicsConfig, ModelConfig
from simmatch.model import InputConfig
from simmatch.online.drift import ERROR, DriftConfig, DriftMonitor
from simmatch.online.novelty import NoveltyConfig, NoveltyDetector
from simmatch.online.rate import RateConfig
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.online.stack import OnlineStack
from simmatch.seeding import seeded

SIZES = (64, 8, 1)
"""Records of a batch."""

WATCHED = 50
"""Records of a batch for novelty and drift, which cost little."""

SOLVERS = {"coordinate descent": "coordinate_descent", "accelerated gradient": "accelerated"}

FEATURES, WATCHED_FEATURES, CLASSES = (128, 512, 1024, 2048), (128, 1024), 10
"""Of readouts, and of novelty."""

BEFORE, DRAWN = 2048, 8192
"""Records that are learnt before those that are timed, and records in all; then they come again."""

RECORDS, QUICK_RECORDS = 256, 32
"""Of each part in a round."""

Batch = Callable[[Tensor], object]
"""Does everything with the records of one batch, given their numbers."""


def measure(windows: Tensor, model: ModelConfig, rounds: int, quick: bool, report: Report) -> None:
    """A table of the layer, one of readouts, one of novelty and drift.

    Parameters
    ----------
    windows: [N, 1, 1, T], on which the layer learns.
    model: of one layer.
    quick: small readouts alone, and fewer records.
    """
    count, widths = (QUICK_RECORDS, FEATURES[:1]) if quick else (RECORDS, FEATURES)
    cases: dict[tuple[str, str, int], Batch] = {}
    for name, solver in SOLVERS.items():
        for size in SIZES:
            cases["layer", name, size] = _layer(windows, model, solver)
    for features in widths:
        for size in SIZES:
            cases["readout", str(features), size] = _readout(features)
    cases |= {("novelty", f"{features} features", WATCHED): _novelty(features) for features in WATCHED_FEATURES}
    cases["drift", "error, novelty and objective", WATCHED] = _drift()
    found = _timed(cases, rounds, count)
    for (part, what, size), spread in found.items():
        report.row(kind="cost", part=part, of=what, batch=size, **spread.fields("us_per_record"))
    for part, heading in (("layer", "solver"), ("readout", "features")):
        rows = {what: [found[part, what, size].median for size in SIZES] for kind, what, _ in cases if kind == part}
        columns = [heading, *(f"batches of {size}" for size in SIZES)]
        report.table(f"{part}: µs of processor, a record", columns, [[what, *values] for what, values in rows.items()])
    cells = [[f"{part}, {what}", found[part, what, size].median] for part, what, size in cases if size == WATCHED]
    report.table(f"batches of {WATCHED}", ["part", "µs of processor, a record"], cells)


def _timed(cases: Mapping[tuple[str, str, int], Batch], rounds: int, count: int) -> dict[tuple[str, str, int], Spread]:
    """µs a record of every case, after `BEFORE` records that are not timed."""
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in cases}
    first = 0
    for batch in cases.values():
        for numbers in _batches(0, BEFORE, 64):
            batch(numbers)
    for _ in range(rounds):
        for key, batch in cases.items():
            begun, records = time.thread_time(), max(count, 4 * key[2])
            for numbers in _batches(BEFORE + first, records, key[2]):
                batch(numbers)
            seconds[key].append(1e6 * (time.thread_time() - begun) / records)
        first += max(count, 4 * max(SIZES))
    return {key: Spread.of(values) for key, values in seconds.items()}


def _batches(first: int, count: int, size: int) -> Iterator[Tensor]:
    for start in range(first, first + count, size):
        yield torch.arange(start, start + size)


def _layer(windows: Tensor, model: ModelConfig, solver: str) -> Batch:
    layer = model.layers[0]
    dynamics = DynamicsConfig.model_validate({"solver": solver})
    config = ModelConfig(layers=(layer.model_copy(update={"dynamics": dynamics}),))
    stack = OnlineStack(config, InputConfig.of(windows, CLASSES), seed=0, rate=RateConfig(kind="falling"))
    stack.calibrate(windows[:BEFORE])
    return lambda numbers: stack.learn(stack.encode(windows[numbers % len(windows)]))


def _readout(features: int) -> Batch:
    readout, (x, labels) = OnlineReadout(features, ReadoutConfig()), _drawn(features)

    def batch(numbers: Tensor) -> None:
        chosen = numbers % len(x)
        readout.scores(x[chosen])
        readout.learn(x[chosen], labels[chosen])

    return batch


def _novelty(features: int) -> Batch:
    detector, (x, _) = NoveltyDetector(features, NoveltyConfig()), _drawn(features)

    def batch(numbers: Tensor) -> None:
        own = x[numbers % len(x)]
        scores = detector.score(own)
        detector.weights(scores)
        detector.learn(own, scores)

    return batch


def _drift() -> Batch:
    monitor, generator = DriftMonitor(DriftConfig(begin=0)), seeded("costs", 0)

    def batch(numbers: Tensor) -> None:
        values = {name: torch.randn(len(numbers), generator=generator) for name in monitor.config.signals}
        values[ERROR] = (torch.rand(len(numbers), generator=generator) < 0.1).double()
        monitor.add(values, int(numbers[0]))

    return batch


def _drawn(features: int) -> tuple[Tensor, Tensor]:
    """Features around the means of classes, and the classes."""
    generator = seeded("costs", features)
    labels = torch.randint(CLASSES, (DRAWN,), generator=generator)
    means = torch.randn(CLASSES, features, generator=generator)
    return means[labels] + torch.randn(DRAWN, features, generator=generator), labels
