"""Send the records of a run that have not reached MLflow yet: `python -m jobs.sync runs/digits`.

Sending again does no harm: MLflow keeps one copy of each row. Another server (`--uri`) gets the whole run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.redaction import one_line, redact
from cluster.text import count
from cluster.tracking.config import URI_VARIABLE, check_uri, recorded_uri, resolve_registry
from cluster.tracking.events import FinishEvent, StartEvent, Unreadable
from cluster.tracking.mlflow_model import ModelLogger, load_exported
from cluster.tracking.mlflow_sink import PARENT, make_sender
from cluster.tracking.sender import Sender
from cluster.tracking.spool import SPOOL_NAME, Spool, SpoolBusyError
from cluster.tracking.spool_parts import FOLDER, SpoolParts
from jobs.display import ProgressBars
from jobs.entry_point import run_main
from jobs.options import amount
from jobs.run_directory import local_folder
from jobs.signals import SignalHandler
from simmatch.config import ConfigError
from simmatch.files import write_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if everything is sent, 1 if events are left or refused, 2 for a wrong call; 130, 143
    or 129 after a signal.
    """
    options = _parser().parse_args(arguments)
    try:
        run_dir = local_folder("RUN_DIR", options.run_dir, Path()).absolute()
        spool = Spool(run_dir / SPOOL_NAME)
        _join_parts(spool.path)
        start, ended = _inspect(spool)
        uri = check_uri(options.uri or recorded_uri(start.uri, run_dir))
        registry = resolve_registry(uri)
        spool.open()
    except (ConfigError, SpoolBusyError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    signals = SignalHandler()
    try:
        with signals:
            sender = make_sender(spool, uri, run_dir, options.timeout, ModelLogger(load_exported), registry=registry)
            sender.delivery.load()
            _send(sender, options.wait)
            return _report(sender, redact(uri), ended)
    except KeyboardInterrupt:
        print("interrupted; the same command sends what is left", file=sys.stderr)
        return signals.status
    finally:
        spool.close()


def _join_parts(spool: Path) -> None:
    """In a copy of a run that was killed while its run directory was an object store: add to the spool what only the
    parts hold.
    """
    parts = list((spool.parent / FOLDER).glob("*.jsonl"))
    present = [*parts, *([spool] if os.path.lexists(spool) else [])]
    if not parts or any(path.is_symlink() or not path.is_file() for path in present):
        return
    lines = SpoolParts(spool.parent).read()
    if not spool.exists() or len(lines) > spool.stat().st_size:
        write_whole(spool, lines)


def _inspect(spool: Spool) -> tuple[StartEvent, bool]:
    """The first event, and whether the end of the run is recorded."""
    if not spool.path.is_file():
        raise ConfigError(f"RUN_DIR: expected a folder with {SPOOL_NAME}, got {spool.path.parent}")
    start, ended = None, False
    for event, _ in spool.read():
        start = start or event
        if isinstance(event, (StartEvent, FinishEvent)):
            ended = isinstance(event, FinishEvent)
    if isinstance(start, Unreadable) and start.kind == "start":
        raise ConfigError(f"RUN_DIR: {SPOOL_NAME}: {start.reason}")
    if not isinstance(start, StartEvent):
        raise ConfigError(f"RUN_DIR: expected {SPOOL_NAME} to begin with the start of a run, got {spool.path}")
    return start, ended


def _send(sender: Sender, wait_s: float) -> None:
    """Send until done, or until no event was accepted for `wait_s`."""
    total, done = sender.delivery.pending(), 0
    with ProgressBars(Console(stderr=True), keep=True) as bars:

        def on_sent(sent: int) -> None:
            nonlocal done
            done += sent
            bars.update("sending events", done, total)
            if sent:
                sender.close(wait_s)

        sender.close(wait_s)
        sender.run(on_sent)


def _report(sender: Sender, shown_uri: str, ended: bool) -> int:
    delivery = sender.delivery
    pending = delivery.pending()
    sent = count(delivery.sent - delivery.rejected, "event")
    print(f"{sent} sent to {shown_uri}, run {delivery.progress.runs.get(PARENT, 'unknown')}")
    for line in dict.fromkeys(sender.told):  # an event may be sent twice
        print(line)
    for note in delivery.notes:
        print(f"refused: {note}", file=sys.stderr)
    if pending:
        print(f"error: {count(pending, 'event')} not sent; the latest attempt failed: {sender.reason}", file=sys.stderr)
    elif not ended:
        print("the end of the run is not recorded, so MLflow shows it as running")
    return 1 if pending or delivery.rejected else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.sync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory (the folder that holds events.jsonl)")
    parser.add_argument(
        "--uri",
        help=f"MLflow's tracking URI (default: the one recorded, if ${URI_VARIABLE} or the default is the same)",
    )
    parser.add_argument(
        "--wait", type=amount, default=60.0, metavar="S", help="give up after this long without success (default: 60)"
    )
    parser.add_argument(
        "--timeout", type=amount, default=10.0, metavar="S", help="timeout of one request (default: 10)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
