"""`python -m jobs.benchmark stream`: rows learn streams, test then learn; tables, intervals and figures.

Results are kept in `RUN_DIR/results/`, a file for each stream, labelling, row and seed: called again, the command
measures what has none. `--report` measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from jobs.benchmarks.stream import alarms, comparison, novelty, readouts, service, speed
from jobs.benchmarks.stream.catalogue import STREAMS
from jobs.benchmarks.stream.prequential import Result, measure
from jobs.benchmarks.stream.results import Store, curves, differences, held_out_table, table
from jobs.benchmarks.stream.streams import Labelling, Stream
from jobs.options import add_parts, at_least
from jobs.reporting import Report
from simmatch.config import ConfigError
from simmatch.files import write_whole


@dataclass(frozen=True)
class Unit:
    """What one result is of; `key` names the stream in `STREAMS`."""

    key: str
    labelling: Labelling
    row: str
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark in addition to the common ones."""
    add_parts(parser, ("rows", "speed", "alarms", "novelty", "readouts", "comparison", "service"))
    parser.add_argument(
        "--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS), metavar="NAME",
        help=f"of {', '.join(STREAMS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="such as 1%% or '5%% late 500' (default: all of a stream)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="(default: 3; quick: 1)")
    parser.add_argument("--data", default=".", metavar="DIR", help="folder of the data of the streams (default: .)")
    parser.add_argument("--report", action="store_true", help="tables and figures of the results so far; no measuring")


def run(options: argparse.Namespace, report: Report) -> None:
    """The parts; the tables of each but the rows are kept in a file of its own."""
    if "rows" in options.parts:
        _rows(options, report)
    folder, quick = Path(options.data), options.quick
    rounds = 2 if quick else options.rounds
    seeds = range(options.seed, options.seed + (1 if quick else options.seeds))
    parts: dict[str, Callable[[], None]] = {
        "speed": lambda: speed.measure(STREAMS["bearings-types"].make(folder, quick), rounds, quick, report),
        "alarms": lambda: alarms.measure(folder, quick, seeds, report),
        "novelty": lambda: novelty.measure(folder, quick, seeds, report),
        "readouts": lambda: readouts.measure(folder, quick, seeds, report),
        "comparison": lambda: comparison.measure(quick, options.seed, report),
        "service": lambda: service.measure(quick, rounds, options.seed, report),
    }
    for name, measure_part in parts.items():
        if name in options.parts and not options.report:
            report.tables.clear()
            measure_part()
            text = "\n".join(each.markdown() for each in report.tables)
            write_whole(report.run_dir / f"tables-{name}.md", text.encode())


def _rows(options: argparse.Namespace, report: Report) -> None:
    """Measure what has no result, then show all. Settings are chosen with the first seed."""
    units, store = list(_units(options)), Store(report.run_dir / ("quick" if options.quick else "results"))

    @cache
    def stream(key: str) -> Stream:
        return STREAMS[key].make(Path(options.data), options.quick)

    if not options.report:
        missing = [unit for unit in units if _found(store, unit) is None]
        with report.progress(len(missing)) as step:
            for unit in missing:
                step(f"{unit.key}, {unit.labelling.name}, {unit.row}, seed {unit.seed}")
                kind, first = STREAMS[unit.key].rows[unit.row], _found(store, replace(unit, seed=options.seed))
                settings = None if first is None else first.settings
                result = measure(stream(unit.key), unit.row, kind, unit.labelling, unit.seed, settings)
                store.keep(result.model_copy(update={"stream": unit.key}))
    results = [found for unit in units if (found := _found(store, unit)) is not None]
    for result in results:
        report.row(kind="result", **result.model_dump(exclude={"right", "sizes"}))
    _show(results, report)


def _units(options: argparse.Namespace) -> Iterator[Unit]:
    """What is asked for, all rows of a seed before the next seed."""
    known = {row: None for key in options.streams for row in STREAMS[key].rows}
    labels = {each.name: None for key in options.streams for each in STREAMS[key].labellings}
    for option, given, names in (("--rows", options.rows, known), ("--labels", options.labels, labels)):
        if unknown := sorted(set(given or ()) - names.keys()):
            raise ConfigError(f"{option}: expected some of {'; '.join(names)}, got {unknown[0]}")
    for seed in range(options.seed, options.seed + (1 if options.quick else options.seeds)):
        for key in options.streams:
            for labelling in STREAMS[key].labellings:
                if options.labels is None or labelling.name in options.labels:
                    rows = [row for row in STREAMS[key].rows if options.rows is None or row in options.rows]
                    yield from (Unit(key, labelling, row, seed) for row in rows)


def _found(store: Store, unit: Unit) -> Result | None:
    return store.find(unit.key, unit.labelling.name, unit.row, unit.seed)


def _show(results: list[Result], report: Report) -> None:
    """Tables of every stream and labelling, also as Markdown in one file; curves."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.stream, result.labels), []).append(result)
    text = []
    for (key, labels), own in groups.items():
        entry = STREAMS[key]
        rows = list(entry.rows)
        tables = [table(own, rows), held_out_table(own, rows)]
        tables += [differences(own, row, rows) for row in (rows[0], *entry.compared)]
        for each in tables:
            if each.rows:
                each.show(report.console)
                text.append(each.markdown())
        name = Store(Path()).path(key, labels, "", 0).parent.as_posix().replace("/", "-")
        curves(own, list(entry.rows), report.run_dir / "figures" / f"{name}.png")
    write_whole(report.run_dir / "tables.md", "\n".join(text).encode())
    report.note(f"tables: {report.run_dir / 'tables.md'}; figures: {report.run_dir / 'figures'}")
