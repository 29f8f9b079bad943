"""One process of a stream: its run directory, its records, and what signals do to it."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cluster.controller import RunFailed
from cluster.failures import classify
from cluster.policy import RanksLostError
from cluster.redaction import Redactor, one_line, redact
from cluster.text import count
from cluster.tracking.events import RunStatus
from cluster.tracking.spool import SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.entry_point import BAD_INPUT, FAILED
from jobs.origin import program_commit, source_tags
from jobs.ray_session import shut_down_ray, start_ray
from jobs.recording import outcome_fields, send_records
from jobs.same_run import refuse_differences
from jobs.signals import CONTINUES, Interrupted, SignalHandler, exit_status
from jobs.streaming.config import FREE, StreamConfig, parse_stream
from jobs.streaming.display import StreamDisplay
from jobs.streaming.journal import Journal, JournalError
from jobs.streaming.outcome import Outcome, Usage
from jobs.streaming.records import SourceError
from jobs.streaming.seen import Seen
from jobs.streaming.service import Service, Watcher
from jobs.streaming.sources import open_source
from simmatch.config import ConfigError
from simmatch.documents import DocumentError, dump_json, dump_yaml, load_yaml_file
from simmatch.files import locked, make_folder, write_whole
from simmatch.memory import Shortage
from simmatch.online.drift import DriftMonitor
from simmatch.precision import exact_float32
from simmatch.sharding.faults import SharedFault

LOCK = "lock"
ENDS: dict[RunStatus, str] = {"FINISHED": "ended", "KILLED": "ended by a signal; the same command goes on"}
COPIES_S = 30.0
"""Longest wait for copies of snapshots at the end."""


def read_config(run_dir: Path) -> StreamConfig:
    """The configuration of a run directory.

    Raises
    ------
    ConfigError
        There is none, or it is damaged.
    """
    try:
        values = load_yaml_file(run_dir / "config.yaml")
        return parse_stream(values if isinstance(values, dict) else {})
    except (OSError, DocumentError, ConfigError) as error:
        raise ConfigError(f"--run-dir: expected the folder of a stream, got {run_dir}: {one_line(error)}") from None


def choose(config: StreamConfig, base: Path, resume: str) -> Path:
    """The run directory: `auto` is `base`, begun or new; `never` the first of its numbers that is free.

    Raises
    ------
    ConfigError
        There is another stream.
    """
    if resume == "never":
        number = 2
        folder = base
        while (folder / "config.yaml").exists():
            folder, number = base.with_name(f"{base.name}-{number}"), number + 1
        return folder
    if (base / "config.yaml").exists():
        free = (*FREE, "name", *(("mesh",) if config.reduce == "exact" else ()))  # the same bits on any mesh
        refuse_differences(config.model_dump(mode="json"), read_config(base).model_dump(mode="json"), base, free)
    return base


class StreamJob:
    """Runs a stream to its end, or to a signal.

    Parameters
    ----------
    tracker: of this run, not started yet.
    """

    def __init__(self, config: StreamConfig, run_dir: Path, tracker: Tracker, console: Console) -> None:
        self.config, self.run_dir, self.tracker, self.console = config, run_dir, tracker, console
        self._hide = Redactor(os.environ)
        self._display = StreamDisplay(console, self._hide)
        self._signals = SignalHandler(self._on_signal)
        self._signum: int | None = None
        self._service: Service | None = None
        self._seen: Seen | None = None
        self._over = False
        self._torn = False
        """Whether a batch may be learnt in part: there is no state then, and maybe no device or rank to ask for one."""

    def run(self) -> int:
        """Returns the exit status."""
        try:
            make_folder(self.run_dir)
            with locked(self.run_dir / LOCK, 0.0):
                return self._run()
        except TimeoutError:
            return self._refuse(f"another process works in {self.run_dir}; end it, or use another --run-dir")
        except SpoolBusyError as error:
            return self._refuse(f"another process works in {self.run_dir}: {error}")
        except OSError as error:
            return self._refuse(f"expected a folder that can be written, got {error}")

    def _refuse(self, reason: str) -> int:
        print(f"error: --run-dir: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT

    def _run(self) -> int:
        torch.set_num_threads(self.config.threads)
        exact_float32()
        try:
            seen = self._seen = Seen(self.run_dir, self.config, self._display.note, self.tracker)
        except ConfigError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return BAD_INPUT
        self.tracker.start(self.run_dir.name, layers=0, tags=self._tags())
        self.tracker.params({key: value for key, value in public(self.config).items() if key != "tracking"})
        started = time.monotonic()
        status: RunStatus = "FAILED"
        code, message = FAILED, None
        self._signals.install()
        journal = Journal(self.run_dir / "journal", self.config.journal.segment_bytes)
        try:
            with self._display as display:
                self.tracker.announce_to(display.note)
                self._start_ranks()
                write_whole(self.run_dir / "config.yaml", dump_yaml(public(self.config)))  # from here on it is begun
                journal.open()
                watchers = Several([self._display, seen])
                service = self._service = Service(self.config, self.run_dir, journal, watchers, display.note)
                seen.follow(service.state.pipeline)
                if seen.answers.url is not None:
                    display.note(f"answers at {seen.answers.url}")
                self._stream(service)
            status, code = "FINISHED", 0
        except KeyboardInterrupt:
            self._torn = True
        except Exception as error:
            self._torn = not isinstance(error, (JournalError, SourceError, RunFailed, OSError))
            message = self._reason(error)
            code = BAD_INPUT if isinstance(error, ConfigError) else FAILED
        finally:
            self._over = True
            journal.close()
        if self._signum is not None and message is None:
            status, code, message = "KILLED", exit_status(self._signum), str(Interrupted(self._signum))
        self._close(status, message, time.monotonic() - started)
        if self.config.mesh.world_size > 1:
            shut_down_ray()
        return code

    def _reason(self, error: Exception) -> str | None:
        """What to tell of an error that ends the stream; None where a signal has ended it. Raises one that is a fault
        of this program."""
        if isinstance(error, RanksLostError) and self._signum is not None:
            self._display.note(str(error))  # a signal to all processes has reached Ray's, too
            return None
        if isinstance(error, (ConfigError, JournalError, SourceError, RunFailed, OSError, RanksLostError, SharedFault)):
            return str(error)
        shortage = Shortage.of(error) if isinstance(error, (RuntimeError, MemoryError)) else None
        if shortage is None and not isinstance(error, torch.AcceleratorError):
            raise error
        return f"device: {shortage or classify(error).message}"

    def _start_ranks(self) -> None:
        """Join or start a Ray cluster, where the candidates' stacks are on several ranks."""
        config = self.config
        if config.mesh.world_size > 1:
            ranks = config.mesh.world_size * len(config.candidates)
            address = start_ray(ranks * config.cluster.cpus_per_rank, config.cluster.heartbeat_s)
            self._display.note(f"ray: {address}; mesh: {config.mesh}; device: {config.device}")

    def _stream(self, service: Service) -> None:
        """Catch up with the journal, then read the source."""
        journal, note = service.journal, self._display.note
        if journal.cut_bytes:
            note(f"{count(journal.cut_bytes, 'byte')} that a crash left unfinished cut off; what they held comes again")
        before = journal.count
        service.catch_up(lambda: self._display.restore(service.state.pipeline))
        if service.stopping.is_set():
            return
        batches = service.state.ledger.batches
        note(f"{self.run_dir}: {'continues after' if before else 'begins with'} batch {batches if before else 1}")
        positions, period_s = service.state.ledger.positions, self.config.data.period
        source = open_source(self.config.source, positions, note, period_s=period_s)
        DriftMonitor(self.config.drift)  # loads what it needs, some 200,000 objects
        gc.collect()
        gc.freeze()  # else each full collection looks at these and all modules, while answers wait
        try:
            service.run(source)
        finally:
            gc.unfreeze()
            source.close()
            service.close(COPIES_S)

    def _close(self, status: RunStatus, message: str | None, seconds: float) -> None:
        """Write and show the results, then wait for MLflow."""
        if message is not None:
            print(f"error: {one_line(self._hide(message))}", file=sys.stderr)
        if status == "KILLED":
            self._display.note(CONTINUES)
        summary = self._summary(status, message, seconds)
        self.tracker.metrics(int(summary["records"]), {"seconds": seconds})
        self.tracker.finish(status)
        if self._seen is not None:
            end = ENDS[status] if status != "FAILED" else f"failed: {one_line(self._hide(message or ''))}"
            self._seen.close(end, model=not self._torn)
        if self._service is not None:
            self._service.state.pipeline.close()  # for digest and model the ranks are asked
        if self._display.begun:
            self._display.note(self._display.line())
        send_records(self.tracker, self._display.note)
        try:
            write_whole(self.run_dir / "summary.json", dump_json(summary | outcome_fields(self.tracker)))
            self._display.note(f"journal, snapshots, summary: {self.run_dir}")
        except OSError as error:
            self._display.note(f"summary.json is not written: {error}")

    def _summary(self, status: RunStatus, message: str | None, seconds: float) -> dict[str, Any]:
        service = self._service
        if service is None:
            return {"status": status, "message": message, "records": 0, "seconds": seconds}
        pipeline = service.state.pipeline
        candidates = pipeline.candidates.items()
        return {
            "status": status,
            "message": message,
            "records": pipeline.intake.records,
            "windows": pipeline.windows,
            "batches": service.state.ledger.batches,
            "duplicates": service.duplicates,
            "set_aside": pipeline.intake.set_aside,
            "classes": list(pipeline.intake.classes),
            "champion": pipeline.champion,
            "accuracy": {name: one.right / one.answered if one.answered else None for name, one in candidates},
            "answered": {name: one.answered for name, one in candidates},
            "drifts": {name: one.drifts for name, one in candidates},
            "digest": None if self._torn else service.digest,
            "seconds": seconds,
        }

    def _on_signal(self, signum: int) -> None:
        """The first signal asks for a last snapshot, the next one ends the process; at the end they end waits."""
        if self._over:
            self.tracker.hurry()
        elif self._signum is None and self._service is not None:
            self._signum = signum
            self._service.stopping.set()
        else:
            self._signum = signum
            raise Interrupted(signum)

    def _tags(self) -> dict[str, str]:
        candidates = count(len(self.config.candidates), "candidate")
        return source_tags(program_commit()) | {
            "mlflow.note.content": f"A stream, source: {self.config.source.kind}; {candidates}",
            "simmatch.host": os.uname().nodename,
            "simmatch.device": self.config.device,
        }


class Several:
    """Tells several what there is to see."""

    def __init__(self, parts: Sequence[Watcher]) -> None:
        self._parts = parts

    def add(self, outcome: Outcome, usage: Usage) -> None:
        for part in self._parts:
            part.add(outcome, usage)

    def idle(self) -> None:
        for part in self._parts:
            part.idle()

    def sync(self) -> None:
        for part in self._parts:
            part.sync()


def public(config: StreamConfig) -> dict[str, Any]:
    """Plain values as they may be written down: no credentials in an address."""
    values: dict[str, Any] = config.model_dump(mode="json")
    if config.tracking.uri is not None:
        values["tracking"]["uri"] = redact(config.tracking.uri)
    if config.events.webhook is not None:
        values["events"]["webhook"]["url"] = redact(config.events.webhook.url)
    return values
