"""Drift: how often it is found where there is none, and how soon where there is.

    stationary   records of one distribution: each alarm is a false one. Simulated signals, and those of a model on
                 windows of bearings at one load, which begin at any sample; the model learns on, or not. Records are
                 independent, or come in runs, where detectors are also measured that take them for independent
    changes      the model learns one load, or upright images, then another follows: records until the alarm
    electricity  a real stream, of which nobody knows when it changes: alarms are counted

Alarms in one batch are one. Intervals are those of Clopper and Pearson (1934), at 95 %: exact for independent alarms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scipy.stats import binomtest
from torch import Generator

from jobs.benchmarks.stream.bearings import FILES
from jobs.benchmarks.stream.electricity import electricity
from jobs.benchmarks.stream.stationary import Autoregressive, Draw, Runs, Signals, Switching, images, windows_at
from jobs.benchmarks.stream.watched import BATCH, Watched, Watching
from jobs.reporting import Report
from simmatch.online.drift import Drift, DriftConfig, DriftMonitor
from simmatch.seeding import seeded

ERROR_RATES = (0.02, 0.1, 0.4)
"""Of simulated errors, in turn."""

WARM_UP, BEFORE, SOON, AFTER = 5_000, 1_000, 500, 2_000
"""Records that a model learns first, those before the change, those after it among which it is to be found, and those
among which it is looked for."""

SETTLED = 20_000
"""More records before a change in a stream of runs: its signals are watched later."""

CHANGES = ((0, 1), (1, 2), (2, 3), (3, 0))
"""Of loads."""

COEFFICIENTS, SPREADS = (0.3, 0.5, 0.9, 0.98), (0.3, 1.0)
"""Of simulated signals that depend on their past."""

LENGTH, SHIFT = 20_000, 1.5
"""Records of a simulated stream of dependent signals; the change of such a signal, in standard deviations."""

BLIND = "taken for independent"
"""Of detectors that see values instead of blocks."""

PER = 20_000
"""Records that rates of false alarms are quoted for."""


@dataclass(frozen=True)
class Counted:
    """False alarms among stationary records."""

    alarms: int
    records: int

    def fields(self) -> dict[str, float]:
        """For a row: the rate, and the interval that holds it.

        >>> {name: round(value, 1) for name, value in Counted(alarms=3, records=10_000).fields().items()}
        {'alarms': 3, 'records': 10000, 'rate': 6.0, 'low': 1.2, 'high': 17.5}
        """
        low, high = (PER * end for end in binomtest(self.alarms, self.records).proportion_ci())
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
    headings = {"change": "change", "runs": "runs", "soon": f"found within {SOON}",
                "found": f"within {AFTER:,}", "median": "records, median",
                "greatest": "greatest", "signals": "first seen in"}  # fmt: skip
    report.rows_table("records until a drift is found", headings, rows)
    report.row(kind="electricity", **_electricity(folder, quick, seeds[0]))


# -- no change ---------------------------------------------------------------------------------------------------------


def _stationary(folder: Path, quick: bool, seeds: Sequence[int]) -> Iterator[tuple[str, Counted]]:
    share, independent = 100 if quick else 1, Autoregressive(0.0)
    as_independent = DriftConfig(begin=0, block=1)
    for name, keep in (("simulated", DriftConfig().keep), ("simulated, never rebuilt", 10**9)):
        yield name, simulated(1_200_000 // share, seeds[0], DriftConfig(begin=0, keep=keep), independent)
    draw = windows_at(folder, 0)
    for name, learns in (("bearings, load 0, frozen", False), ("bearings, load 0, learning", True)):
        yield name, _at_rest(draw, 240_000 // share, seeds, Watching(learns=learns))
    dependent: dict[str, Signals] = {f"autoregressive, {c}": Autoregressive(c) for c in COEFFICIENTS}
    dependent |= {f"classes in runs, means spread by {spread}": Switching(spread) for spread in SPREADS}
    for name, signals in dependent.items():
        length = LENGTH // share
        yield f"simulated, {name}", simulated(240_000 // share, seeds[0], DriftConfig(begin=0), signals, length)
        yield f"simulated, {name}, {BLIND}", simulated(60_000 // share, seeds[0], as_independent, signals, length)
    for turns in (False, True):
        for blind, records in ((False, 120_000), (True, 30_000)):
            name = f"bearings, load 0, learning, faults in {'turns' if turns else 'runs'}"
            watching = Watching(drift=DriftConfig(block=1) if blind else DriftConfig())
            counted = _at_rest(windows_at(folder, 0, Runs(turns=turns)), records // share, seeds, watching)
            yield f"{name}, {BLIND}" if blind else name, counted


def simulated(records: int, seed: int, config: DriftConfig, signals: Signals, length: int | None = None) -> Counted:
    """Alarms in simulated signals, with errors of three rates in turn, in streams of a length.

    length: None for one stream of each rate.

    >>> simulated(2_000, seed=0, config=DriftConfig(begin=0), signals=Autoregressive(0.0)).alarms
    0
    """
    generator, alarms, seen = seeded("stationary signals", seed), 0, 0
    length = (length or records // len(ERROR_RATES)) // BATCH * BATCH
    for number in range(max(1, records // length)):
        monitor = DriftMonitor(config)
        values = signals(length, ERROR_RATES[number % len(ERROR_RATES)], generator)
        for start in range(0, length, BATCH):
            part = {name: signal[start : start + BATCH] for name, signal in values.items()}
            alarms += bool(monitor.add(part, start))
        seen += length
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
    for before, after in CHANGES:
        yield f"bearings, load {before} → {after}", _found("bearings", loads[before], loads[after], seeds, runs)
    for degrees in (30, 90):
        yield f"Fashion-MNIST, turned by {degrees}°", _found("images", images(0), images(degrees), seeds, runs)
    settled, order = (BEFORE if quick else SETTLED), Runs()
    loads = [windows_at(folder, load, order) for load in range(len(FILES))]
    for before, after in CHANGES:
        name = f"bearings, faults in runs, load {before} → {after}"
        yield name, _found("bearings", loads[before], loads[after], seeds, runs, settled)
    for c in (0.0, *COEFFICIENTS):
        yield f"simulated, autoregressive, {c}", _shifted(Autoregressive(c), settled, seeds, runs)


def _found(
    kind: str, before: Draw, after: Draw, seeds: Sequence[int], runs: int, settled: int = 0
) -> list[Drift | None]:
    found: list[Drift | None] = []
    for seed in seeds:
        generator = seeded("changes", seed)
        model = Watched(kind, before(WARM_UP, generator), seed)
        for _ in range(settled // BATCH):
            model.see(*before(BATCH, generator))
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


def _shifted(signals: Signals, before: int, seeds: Sequence[int], runs: int) -> list[Drift | None]:
    """What is found where novelty rises by `SHIFT` and all else stays."""
    found: list[Drift | None] = []
    for seed in seeds:
        generator = seeded("shifts", seed)
        for _ in range(runs):
            values, monitor = signals(before + AFTER, ERROR_RATES[0], generator), DriftMonitor(DriftConfig(begin=0))
            values["novelty"][before:] += SHIFT
            drifts: list[Drift] = []
            for start in range(0, before + AFTER, BATCH):
                part = {name: signal[start : start + BATCH] for name, signal in values.items()}
                drifts += [drift for drift in monitor.add(part, start - before) if start >= before]
            found.append(min(drifts, key=lambda drift: drift.number, default=None))
    return found


def _summary(found: list[Drift | None]) -> dict[str, object]:
    drifts = [drift for drift in found if drift is not None]
    delays = [drift.number for drift in drifts]
    names = sorted({drift.signal for drift in drifts})
    by_signal = ", ".join(f"{name} {sum(drift.signal == name for drift in drifts)}" for name in names)
    soon = sum(delay < SOON for delay in delays)
    return {"runs": len(found), "soon": soon, "found": len(drifts), "median": median(delays) if delays else None,
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
