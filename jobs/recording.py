"""The wait for MLflow at the end of every job; then it is said where records are, how many are not there, and why."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.redaction import redact
from cluster.tracking.config import sqlite_uri, sync_command
from cluster.tracking.tracker import Tracker

MODEL = "model: "
"""Begins the note of a model that cannot be logged."""


def send_records(tracker: Tracker, tell: Callable[[str], None]) -> None:
    """Wait until MLflow has everything, for as long as that may take, and say what it has not. The end of every job."""
    if tracker.config.enabled:
        limit_s = tracker.config.flush_s + tracker.config.timeout_s
        tell(f"sending records to MLflow, for at most {limit_s:g} s; Ctrl-C ends the wait")
    tracker.close()
    for line in said(tracker):
        tell(line)


def said(tracker: Tracker) -> list[str]:
    """Lines for a person, once the tracker is closed."""
    lines = []
    number, latest = tracker.refused
    models = [note.removeprefix(MODEL) for note in latest if note.startswith(MODEL)]
    others = [note for note in latest if not note.startswith(MODEL)]
    if tracker.lost:
        lines.append(f"{tracker.lost} records are lost: {tracker.run_dir} was full, or hung")
    if others:
        lines.append(f"MLflow has refused {number - len(models)} records, the latest: {others[-1]}")
    lines += [f"the model is not in MLflow: {why}" for why in models]
    if tracker.unsent:
        lines.append(
            f"{tracker.unsent} records have not reached MLflow, the latest attempt said: {tracker.reason}; "
            f"send them with: {sync_command(tracker.run_dir, tracker.uri)}"
        )
    elif tracker.run_id is not None:
        lines.append(f"MLflow run: {tracker.run_id} ({_where(tracker.uri)})")
    return lines


def facts(tracker: Tracker) -> dict[str, Any]:
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


def _where(uri: str) -> str:
    """How to look at what is in a store: a server has a page; `make ui` opens the database in `runs`."""
    if not uri.startswith("sqlite:"):
        return redact(uri)
    if uri == sqlite_uri(Path("runs") / "mlflow.db"):
        return "make ui"
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
