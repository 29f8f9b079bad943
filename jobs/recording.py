"""Records of a job: MLflow is asked before anything starts; at the end the job waits for it, and reports which records
have arrived.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.controller import RunFailed
from cluster.redaction import one_line, redact
from cluster.text import count
from cluster.tracking.config import TrackingConfig, sqlite_uri, sync_command
from cluster.tracking.events import RunStatus
from cluster.tracking.mlflow_model import ModelLogger
from cluster.tracking.server_check import ask_server
from cluster.tracking.tracker import Tracker
from jobs.display import PLAIN
from jobs.entry_point import BAD_INPUT, FAILED
from jobs.signals import SignalHandler
from simmatch.config import ConfigError

MODEL = "model: "
"""Prefix of the note of a model that cannot be logged."""


def open_tracker(
    run_dir: Path,
    config: TrackingConfig,
    log_model: ModelLogger | None = None,
    *,
    held: bool = False,
    owned: Callable[[], bool] = lambda: True,
) -> Tracker:
    """The tracker of a run, see `Tracker`, once MLflow has been asked whether it takes the run's records.

    One line on standard error says that it does not answer: the run goes on, and its records are kept.

    Raises
    ------
    ConfigError
        MLflow will refuse them; with its reason and what to do about it.
    """
    if config.register is not None and log_model is None:
        raise ConfigError(f"tracking.register: expected none, as this job exports no model, got {config.register!r}")
    tracker = Tracker(run_dir, config, log_model, held=held, owned=owned)
    answer = ask_server(config, run_dir)
    if answer.verdict == "refused":
        raise ConfigError(f"tracking: {answer}")
    if answer.verdict == "away":
        print(f"warning: {answer}; the run goes on, and its records are kept", file=sys.stderr)
    return tracker


def run_recorded(work: Callable[[], None], tracker: Tracker, console: Console, signals: SignalHandler) -> int:
    """Do the work of a comparison and record how it ended; returns the exit status.

    Every result is kept as soon as it is known, so the same command continues after an interruption.
    """
    report = partial(console.print, **PLAIN)
    tracker.announce_to(report)
    started, code = time.monotonic(), FAILED
    status: RunStatus = "FAILED"
    try:
        work()
        status, code = "FINISHED", 0
    except KeyboardInterrupt:
        print("interrupted; all results so far are kept, the same command continues", file=sys.stderr)
        status, code = "KILLED", signals.status
    except (RunFailed, ConfigError) as error:
        print(f"error: {one_line(error)}; all results so far are kept", file=sys.stderr)
        code = BAD_INPUT if isinstance(error, ConfigError) else FAILED
    finally:
        signals.on_signal = lambda _: tracker.hurry()
        tracker.metrics(0, {"seconds": time.monotonic() - started})
        tracker.finish(status)
        send_records(tracker, report)
    return code


def send_records(tracker: Tracker, report: Callable[[str], None]) -> None:
    """Close the tracker, which waits for MLflow, and report the outcome."""
    if tracker.config.enabled:
        limit_s = tracker.config.flush_s + tracker.config.timeout_s
        report(f"sending records to MLflow (at most {limit_s:g} s; Ctrl-C stops waiting)")
    tracker.close()
    for line in outcome_lines(tracker):
        report(line)


def outcome_lines(tracker: Tracker) -> list[str]:
    """What became of the records, for a person; once the tracker is closed."""
    lines = []
    number, latest = tracker.refused
    models = [note.removeprefix(MODEL) for note in latest if note.startswith(MODEL)]
    others = [note for note in latest if not note.startswith(MODEL)]
    if tracker.lost:
        lines.append(f"{count(tracker.lost, 'record')} lost: {tracker.run_dir} was full, or hung")
    if others:
        lines.append(f"{count(number - len(models), 'record')} refused by MLflow, the latest: {others[-1]}")
    lines += [f"the model is not in MLflow: {reason}" for reason in models]
    if tracker.unsent:
        lines.append(
            f"{count(tracker.unsent, 'record')} not sent to MLflow; the latest attempt failed: {tracker.reason}; "
            f"send them with: {sync_command(tracker.run_dir, tracker.uri)}"
        )
    elif tracker.run_id is not None:
        lines.append(f"MLflow run: {tracker.run_id} ({where_to_look(tracker.uri)})")
    return [*lines, *dict.fromkeys(tracker.told)]  # an event may be sent twice


def outcome_fields(tracker: Tracker) -> dict[str, Any]:
    """The same for `summary.json`."""
    number, latest = tracker.refused
    return {
        "mlflow_run_id": tracker.run_id,
        "lost_records": tracker.lost,
        "unsent_records": tracker.unsent,
        "unsent_reason": tracker.reason if tracker.unsent else None,
        "refused_records": number,
        "refusals": latest,
    }


def where_to_look(uri: str) -> str:
    """How to look at the records of a store: a server has a page; `make ui` opens the data base in `runs`."""
    if not uri.startswith("sqlite:"):
        return redact(uri)
    if uri == sqlite_uri(Path("runs") / "mlflow.db"):
        return "make ui"
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
