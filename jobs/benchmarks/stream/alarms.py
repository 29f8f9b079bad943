"""Drift: how often it is found where there is none, and how soon where there is.

    stationary   records drawn at random from one distribution: each alarm is a false one. Simulated signals, and those
                 of a model on windows of bearings at one load, which begin at any sample; the model learns on, or not
    changes      the model learns one load, or upright images, then another follows: records until the alarm
    electricity  a real stream, of which nobody knows when it changes: alarms are counted

Alarms in one batch are one. Intervals are those of Clopper and Pearson (1934), at 95 %: exact for independent alarms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Generator, Tensor

from jobs.benchmarks.stream.bearings import FILES, WINDOW
from jobs.benchmarks.stream.electricity import electricity
from jobs.benchmarks.stream.watched import BATCH, Watched, Watching
from jobs.reporting import Report
from simmatch.data.config import DataConfig
from simmatch.data.prepared import StoredImages
from simmatch.data.sources import load_dataset
from simmatch.online.drift import ERROR, Drift, DriftConfig, DriftMonitor
from simmatch.seeding import seeded

Draw = Callable[[int, Generator], tuple[Tensor, Tensor]]
"""(number of records, generator) → records [n, C, H, W] and their classes."""

HOP = 7
"""Samples between windows that can be drawn: of the recordings of one load, some 150,000."""

ERROR_RATES = (0.02, 0.1, 0.4)
"""Of simulated errors, in turn."""

WARM_UP, BEFORE, AFTER = 5_000, 1_000, 500
"""Records that a model learns first, those before the change, and those after it among which it is to be found."""

PER = 20_000
"""Records that rates of false alarms are quoted for."""


@dataclass(frozen=True)
class Counted:
    """False alarms among stationary records."""

    alarms: int
    records: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the rate per record, at 95 %.

        >>> [round(1e4 * end, 2) for end in Counted(alarms=3, records=10_000).interval]
        [0.62, 8.76]
        """
        from scipy.stats import beta

        k, n = self.alarms, self.records
        return (float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0), float(beta.ppf(0.975, k + 1, n - k))

    def fields(self) -> dict[str, float]:
        """For a row."""
        low, high = (PER * end for end in self.interval)
        return {"alarms": self.alarms, "records": self.records, "rate": PER * self.alarms / self.records,
                "low": low, "high": high}  # fmt: skip


def measure(folder: Path, quick: bool, seeds: Sequence[int], report: Report) -> None:
    """False alarms, then delays, as rows and tables."""
    rows = [{"case": case, **counted.fields()} for case, counted in _stationary(folder, quick, seeds)]
    for row in rows:
        report.row(kind="false alarms", **row)
    headings = {"case": "stationary records", "records": "records", "alarms": "false alarms",
                "rate": f"per {PER:,}", "low": "95 %, from", "high": "to"}  # fmt: skip
    report.rows_table("false alarms, all signals together", headings, rows)
    rows = [{"change": change, **_summary(delays)} for change, delays in _changes(folder, quick, seeds)]
    for row in rows:
        report.row(kind="delay", **row)
    headings = {"change": "change", "runs": "runs", "found": f"found within {AFTER}", "median": "records, median",
                "greatest": "greatest", "signals": "first seen in"}  # fmt: skip
    report.rows_table("records until a drift is found", headings, rows)
    report.row(kind="electricity", **_electricity(folder, quick, seeds[0]))


# -- no change ---------------------------------------------------------------------------------------------------------


def _stationary(folder: Path, quick: bool, seeds: Sequence[int]) -> Iterator[tuple[str, Counted]]:
    share = 100 if quick else 1
    for name, keep in (("simulated", DriftConfig().keep), ("simulated, never rebuilt", 10**9)):
        yield name, simulated(1_200_000 // share, seeds[0], DriftConfig(begin=0, keep=keep))
    draw = windows_at(folder, 0)
    for name, learns in (("bearings, load 0, frozen", False), ("bearings, load 0, learning", True)):
        yield name, _at_rest(draw, 240_000 // share, seeds, Watching(learns=learns))


def simulated(records: int, seed: int, config: DriftConfig) -> Counted:
    """Alarms in independent signals: errors of three rates in turn, the others Gaussian.

    >>> simulated(2_000, seed=0, config=DriftConfig(begin=0)).alarms
    0
    """
    generator, alarms, seen = seeded("stationary signals", seed), 0, 0
    for rate in ERROR_RATES:
        monitor = DriftMonitor(config)
        for _ in range(records // len(ERROR_RATES) // BATCH):
            values = {name: torch.randn(BATCH, generator=generator) for name in config.signals}
            values[ERROR] = (torch.rand(BATCH, generator=generator) < rate).double()
            alarms += bool(monitor.add(values, seen))
            seen += BATCH
    return Counted(alarms, seen)


def _at_rest(draw: Draw, records: int, seeds: Sequence[int], watching: Watching) -> Counted:
    """Alarms of models, one per seed, on records of what they have learnt."""
    alarms = seen = 0
    for seed in seeds:
        generator = seeded("stationary records", seed)
        model = Watched("bearings", draw(WARM_UP, generator), seed, watching)
        for _ in range(records // len(seeds) // BATCH):
            alarms += bool(model.see(*draw(BATCH, generator)).drifts)
            seen += BATCH
    return Counted(alarms, seen)


# -- changes -----------------------------------------------------------------------------------------------------------


def _changes(folder: Path, quick: bool, seeds: Sequence[int]) -> Iterator[tuple[str, list[Drift | None]]]:
    """Of each change, what was found in each run; numbers count records since the change."""
    loads, runs = [windows_at(folder, load) for load in range(len(FILES))], 1 if quick else 5
    for before, after in ((0, 1), (1, 2), (2, 3), (3, 0)):
        yield f"bearings, load {before} → {after}", _found("bearings", loads[before], loads[after], seeds, runs)
    for degrees in (30, 90):
        yield f"Fashion-MNIST, turned by {degrees}°", _found("images", images(0), images(degrees), seeds, runs)


def _found(kind: str, before: Draw, after: Draw, seeds: Sequence[int], runs: int) -> list[Drift | None]:
    found: list[Drift | None] = []
    for seed in seeds:
        generator = seeded("changes", seed)
        model = Watched(kind, before(WARM_UP, generator), seed)
        state = model.state()
        for _ in range(runs):
            model.restore(state)
            for _ in range(BEFORE // BATCH):
                model.see(*before(BATCH, generator))
            found.append(_first_drift(model, after, generator))
    return found


def _first_drift(model: Watched, draw: Draw, generator: Generator) -> Drift | None:
    model.number = 0
    for _ in range(AFTER // BATCH):
        drifts = model.see(*draw(BATCH, generator)).drifts
        if drifts:
            return min(drifts, key=lambda drift: drift.number)
    return None


def _summary(found: list[Drift | None]) -> dict[str, object]:
    drifts = [drift for drift in found if drift is not None]
    delays = [drift.number for drift in drifts]
    names = sorted({drift.signal for drift in drifts})
    by_signal = ", ".join(f"{name} {sum(drift.signal == name for drift in drifts)}" for name in names)
    return {"runs": len(found), "found": len(drifts), "median": median(delays) if delays else None,
            "greatest": max(delays, default=None), "signals": by_signal}  # fmt: skip


def _electricity(folder: Path, quick: bool, seed: int) -> dict[str, int]:
    stream = electricity(folder, quick=quick)
    warm_up = stream.warm_up.read(slice(None)), stream.warm_up.labels
    model, alarms, records = Watched("electricity", warm_up, seed), 0, 0
    for segment in stream.segments:
        for batch in segment.batches(BATCH):
            alarms += bool(model.see(*batch).drifts)
            records += len(batch[1])
    return {"alarms": alarms, "records": records}


# -- records -----------------------------------------------------------------------------------------------------------


def windows_at(folder: Path, load: int) -> Draw:
    """Windows of bearings at one load, which begin anywhere; classes are the nine faults."""
    path = str(folder / "bearings" / FILES[load])
    config = DataConfig(path=path, window=WINDOW, hop=HOP, label_pattern=r"/(\w+)$", split="time", test_fraction=0.01)
    dataset = load_dataset(config)
    return _drawn(dataset.train_images, dataset.train_labels)


def images(degrees: float) -> Draw:
    """Fashion-MNIST, turned."""
    from torchvision.transforms.functional import InterpolationMode, rotate

    dataset = load_dataset(DataConfig(name="fashion_mnist"))
    draw = _drawn(dataset.train_images, dataset.train_labels)

    def turned(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x, labels = draw(count, generator)
        return rotate(x.float() / 255, degrees, InterpolationMode.BILINEAR), labels

    return turned


def _drawn(x: StoredImages, labels: Tensor) -> Draw:
    def draw(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (count,), generator=generator)
        return x[chosen], labels[chosen]

    return draw
