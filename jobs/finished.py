"""What the same command does once its run has finished: it shows the result, and sends records that are left."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.console import Console

from cluster.checkpoints.manifest import MANIFEST, readable_manifest
from cluster.redaction import redact
from cluster.storage import AnyPath, find, read
from cluster.text import count
from cluster.tracking.config import resolve_uri
from cluster.tracking.delivery import PROGRESS_NAME, SendProgress
from cluster.tracking.mlflow_sink import PARENT
from cluster.tracking.spool import SPOOL_NAME, Spool, SpoolBusyError
from cluster.training import check_data
from jobs import sync
from jobs.display import PLAIN
from jobs.mirror import Mirror
from jobs.recording import where_to_look
from jobs.run_directory import RunStart
from simmatch.config import ConfigError
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset
from simmatch.documents import dump_json, load_json
from simmatch.files import write_whole


def report_finished(start: RunStart, dataset: Dataset, console: Console) -> int:
    """Send what MLflow has not got yet, and show the result in one line. Returns the exit status, 0.

    Raises
    ------
    ConfigError, DataError
        The run directory does not answer, or the run learnt from other data.
    """
    try:
        _check_data(start.destination, dataset)
        summary = load_json(read(start.destination / "summary.json"))
        if start.config.tracking.enabled and summary.get("unsent_records") != 0:  # None: it was killed while it sent
            summary = _send_rest(start, summary)
    except OSError as error:
        raise ConfigError(f"--run-dir: expected a store that answers, got {error}") from None
    console.print(redact(line_of(start, summary)), **PLAIN)
    return 0


def _check_data(run_dir: AnyPath, dataset: Dataset) -> None:
    """By the newest manifest that can be read; no shard is read for that."""
    manifests = (readable_manifest(path.parent) for path in reversed(find(run_dir / "checkpoints", f"*/{MANIFEST}")))
    manifest = next(filter(None, manifests), None)
    try:
        check_data(dataset, None if manifest is None else manifest.data)
    except DataError as error:
        raise DataError(f"--run-dir: {run_dir} has finished: {error}; use --resume never") from None


def _send_rest(start: RunStart, summary: dict[str, Any]) -> dict[str, Any]:
    """Send records as `jobs.sync` does; returns the summary, which then says what is left."""
    tracking, run_dir = start.config.tracking, start.run_dir
    mirror = Mirror(start.destination, run_dir)
    try:
        mirror.pull()
    except SpoolBusyError:  # `jobs.sync` does it already, or the job itself, to its end
        return summary
    with suppress(FileNotFoundError):  # what is gone is refused, as `jobs.sync` says
        mirror.fetch("figures", [path.name for path in find(start.destination / "figures", "*")])
        mirror.fetch_model()
    uri = resolve_uri(tracking, run_dir)
    sync.main([str(run_dir), "--uri", uri, "--wait", str(tracking.flush_s), "--timeout", str(tracking.timeout_s)])
    spool = Spool(run_dir / SPOOL_NAME)
    progress = SendProgress.load(run_dir / PROGRESS_NAME, redact(uri), spool.size_bytes())
    left = spool.count(progress.offset)
    summary |= {"mlflow_run_id": progress.runs.get(PARENT), "unsent_records": left}
    if not left:
        summary |= {"unsent_reason": None}
    write_whole(run_dir / "summary.json", dump_json(summary))
    mirror.push()
    return summary


def line_of(start: RunStart, summary: dict[str, Any]) -> str:
    """The result of a run that has finished."""
    accuracy, run_id, unsent = summary.get("accuracy"), summary.get("mlflow_run_id"), summary.get("unsent_records")
    parts = []
    if isinstance(accuracy, float):
        parts.append(f"test accuracy {accuracy:.4f} ({summary.get('probe')} readout)")
    parts.append(f"model: {start.destination / 'model'}")
    if run_id is not None:
        left = f", {count(unsent, 'record')} not sent" if unsent else ""
        parts.append(f"MLflow run: {run_id} ({where_to_look(resolve_uri(start.config.tracking, start.run_dir))}){left}")
    return f"already finished, see {start.destination}: {'; '.join(parts)} (--resume never starts a new run)"
