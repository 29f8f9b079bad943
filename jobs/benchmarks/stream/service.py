"""The whole service as a user runs it: source, journal with fsync, snapshots, page, answers over HTTP.

    rate      records per second, and seconds of processor per record, beside the pipeline alone on the same batches,
              in turns; the journal per record
    memory    resident memory along a long stream with two candidates
    answers   processor time and latency of requests, by a client in a process of its own, while the stream learns and
              while it waits for records
    restore   seconds from a kill to the state before it: snapshot and the journal since, at its longest

Two streams: whole windows of 32 samples with two candidates, and blocks of 32 samples that are cut into windows of 256,
one for each block, with the layer of `--parts speed`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.stream.asked import asked
from jobs.benchmarks.stream.served import StreamProcess
from jobs.benchmarks.stream.speed import MODEL
from jobs.benchmarks.timing import Spread, Timings
from jobs.options import read_yaml
from jobs.reporting import Report
from jobs.streaming.example import SAMPLES
from jobs.streaming.journal import Journal, list_segments, read_entries
from jobs.streaming.outcome import Outcome, Usage
from jobs.streaming.service import Service
from jobs.streaming.state import StreamState
from simmatch.files import make_folder

SMALL = Path(__file__).parents[2] / "configs" / "stream_small.yaml"
BATCH, WINDOW = 64, 256

POINTS = 20
"""At which memory is looked at."""


@dataclass(frozen=True)
class Sizes:
    """Records of a round, of the long stream, and of those that are learnt while the client asks; requests afterwards;
    batches between two snapshots."""

    per_round: int
    long: int
    asked: int
    requests: int
    every_batches: int


FULL = Sizes(per_round=6_400, long=204_800, asked=19_200, requests=1_000, every_batches=200)
QUICK = Sizes(per_round=640, long=5_120, asked=1_280, requests=50, every_batches=20)

NAMES = {"resident": "resident", "own": "of it not of files"}


@dataclass(frozen=True)
class Call:
    """What one call measures, and where it tells of it."""

    sizes: Sizes
    rounds: int
    step: Callable[[str], None]
    report: Report

    @property
    def most(self) -> int:
        """Records that a stream may need."""
        sizes = self.sizes
        return (self.rounds + 1) * sizes.per_round + sizes.long + sizes.asked + 2 * BATCH * sizes.every_batches


def measure(quick: bool, rounds: int, seed: int, report: Report) -> None:
    """Each case in a process of its own, as rows, tables and figures."""
    sizes, folder = QUICK if quick else FULL, report.run_dir / "service"
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with report.progress(len(CASES) * (rounds + 1) + POINTS + 3) as step:
        call = Call(sizes, rounds, step, report)
        for name, (values, others) in CASES.items():
            with StreamProcess(folder / name.replace(" ", "-"), values(sizes), call.most, seed) as stream:
                stream.start()
                _rates(name, stream, call)
                for other in others:
                    other(stream, call)
    torch.set_num_threads(threads)


def _windows(sizes: Sizes) -> dict[str, Any]:
    """Every buffer of fixed size is full after a quarter of the long stream."""
    changes = {"batch_size": BATCH, "labels": {"ids": sizes.long // 4, "horizon": sizes.long // 20}}
    return {**read_yaml(SMALL), **changes, "snapshot": {"every_batches": sizes.every_batches}}


def _blocks(sizes: Sizes) -> dict[str, Any]:
    return {
        "name": "blocks",
        "data": {"window": WINDOW, "hop": SAMPLES, "calibrate": 4 * BATCH},
        "model": MODEL.model_dump(mode="json"),
        "batch_size": BATCH,
        "snapshot": {"every_batches": sizes.every_batches},
    }


# -- records per second ------------------------------------------------------------------------------------------------


class Alone:
    """The pipeline on the batches of a journal, without anything else."""

    def __init__(self, stream: StreamProcess) -> None:
        self._folder, self._state = stream.run_dir / "journal", StreamState(stream.config)

    def apply(self) -> tuple[float, float]:
        """The batches since the last call: seconds, and those of processor."""
        state = self._state
        entries = read_entries(list_segments(self._folder), state.ledger.entries)
        batches = [batch for number, entry in entries if (batch := state.take(number, entry)) is not None]
        begun, processor = time.perf_counter(), time.thread_time()
        for batch in batches:
            state.pipeline.apply(batch)
        return time.perf_counter() - begun, time.thread_time() - processor


def _rates(case: str, stream: StreamProcess, call: Call) -> None:
    """Rounds after a first one, in which the stacks are calibrated and all is compiled."""
    alone, count, rounds, report = Alone(stream), call.sizes.per_round, call.rounds, call.report
    wall: dict[str, list[float]] = {"service": [], "pipeline alone": []}
    work: dict[str, list[float]] = {name: [] for name in wall}
    for number in range(rounds + 1):
        call.step(f"{case}, round {number}")
        processor = stream.processor_s()
        stream.append(count)
        stream.wait_learnt()
        service = time.perf_counter() - stream.appended_s, stream.processor_s() - processor
        for name, (seconds, processor_s) in (("service", service), ("pipeline alone", alone.apply())):
            if number:
                wall[name].append(seconds)
                work[name].append(processor_s)
    rows = []
    for name in wall:
        row: dict[str, Any] = {"stream": case, "what": name}
        row |= Timings(wall).rate(name, count).fields("records_per_second")
        row |= Spread.of([1e6 * each / count for each in work[name]]).fields("processor_us")
        row |= Timings(wall).speedup("pipeline alone", name).fields("times_seconds")
        row |= Timings(work).speedup("pipeline alone", name).fields("times_processor")
        report.row(kind="service rate", **row)
        rows.append(row | {"range": f"{row['times_processor_min']:.2f}–{row['times_processor_max']:.2f}"})
    headings = {"what": case, "records_per_second": "records / s", "processor_us": "µs of processor, a record",
                "times_processor": "to the pipeline", "range": "rounds", "times_seconds": "by the clock"}  # fmt: skip
    report.rows_table(f"{rounds} rounds of {count:,} records, in turns", headings, rows)
    nbytes = sum(segment.path.stat().st_size for segment in list_segments(stream.run_dir / "journal"))
    row = {"stream": case, "journal": nbytes / stream.appended, "json": stream.json_bytes / stream.appended}
    report.row(kind="journal", **row, records=stream.appended)
    headings = {"stream": "stream", "journal": "bytes of journal, a record", "json": "bytes of its line of JSON"}
    report.rows_table("size of the journal", headings, [row])


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Resident bytes after so many records of the long stream, and those that are not of files."""

    records: int
    resident: int
    own: int


def _memory(stream: StreamProcess, call: Call) -> None:
    """Look at the beginning of the long stream and at every point."""
    found, count = [Memory(0, *stream.memory_bytes())], call.sizes.long
    for point in range(1, POINTS + 1):
        call.step(f"memory, point {point}")
        stream.append(count // POINTS)
        stream.wait_learnt()
        found.append(Memory(count * point // POINTS, *stream.memory_bytes()))
    _show_memory(found, call.report)


def _show_memory(found: Sequence[Memory], report: Report) -> None:
    quarters = found[:: POINTS // 4]
    for each in found:
        report.row(kind="memory", **asdict(each))
    first = quarters[1]
    growth = {name: max(getattr(each, name) for each in found[POINTS // 4 :]) - getattr(first, name) for name in NAMES}
    report.row(kind="memory growth", after=first.records, **growth)
    cells = [
        [f"{each.records:,}", each.resident / 1e6, each.own / 1e6, (each.own - before.own) / 1e6]
        for before, each in pairwise(quarters)
    ]
    columns = ["records", "MB resident", "of it not of files", "MB since the quarter before"]
    report.table("memory, two candidates", columns, cells)
    most = ", ".join(f"{NAMES[name]} {nbytes / 1e6:.2f} MB" for name, nbytes in growth.items())
    report.note(f"more than after the first quarter, at most: {most}")
    with report.figure("service-memory") as figure:
        axes = figure.subplots()
        for name, label in NAMES.items():
            axes.plot(
                [each.records for each in found], [getattr(each, name) / 1e6 for each in found], ".-", label=label
            )
        for each in quarters:
            axes.axvline(each.records, color="0.85", linewidth=0.8, zorder=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("records")
        axes.set_ylabel("MB")
        axes.legend(fontsize=8)


# -- answers, and after a kill -----------------------------------------------------------------------------------------


class Nobody:
    """Is told of outcomes."""

    def add(self, outcome: Outcome, usage: Usage) -> None:
        """See `Watcher`."""

    def idle(self) -> None:
        """See `Watcher`."""

    def sync(self) -> None:
        """See `Watcher`."""


def _answers(stream: StreamProcess, call: Call) -> None:
    call.step("answers")
    asked(stream, WINDOW, call.sizes.asked, call.sizes.requests, call.report)


def _restore(stream: StreamProcess, call: Call) -> None:
    """Killed one batch before a snapshot; restored in this process, then by the same command."""
    call.step("killed")
    every, report = call.sizes.every_batches, call.report
    batches = stream.appended // BATCH
    stream.append((2 * every - 1 - batches % every) % every * BATCH)
    stream.wait_learnt()
    batches = stream.appended // BATCH
    stream.kill()
    wall, work = list[float](), list[float]()
    for _ in range(call.rounds):
        journal = Journal(stream.run_dir / "journal", stream.config.journal.segment_bytes)
        journal.open()
        service = Service(stream.config, stream.run_dir, journal, Nobody(), report.note)
        begun, processor = time.perf_counter(), time.thread_time()
        service.catch_up()
        wall.append(time.perf_counter() - begun)
        work.append(time.thread_time() - processor)
        assert service.state.pipeline.intake.records == stream.appended
        journal.close()
        service.close(0.0)
    call.step("started again")
    begun = time.perf_counter()
    stream.start()
    stream.wait_served(batches)
    again, processor_s = time.perf_counter() - begun, stream.processor_s()
    row: dict[str, Any] = {"records": stream.appended, "since_snapshot": batches % every * BATCH}
    row |= Spread.of(wall).fields("seconds") | Spread.of(work).fields("processor_s")
    row |= {"process_s": again, "process_processor_s": processor_s}
    report.row(kind="restore", **row)
    headings = {"records": "records", "since_snapshot": "since the snapshot", "seconds": "s to restore",
                "processor_s": "of processor", "process_s": "s of a new process until it answers",
                "process_processor_s": "of processor"}  # fmt: skip
    report.rows_table("after a kill", headings, [row])


Measure = Callable[[StreamProcess, Call], None]

CASES: dict[str, tuple[Callable[[Sizes], dict[str, Any]], tuple[Measure, ...]]] = {
    "windows of 32 samples": (_windows, (_memory,)),
    "blocks of 32 samples": (_blocks, (_answers, _restore)),
}
"""Name → its configuration, and what is measured in addition to its rate."""
