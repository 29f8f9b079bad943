"""Learn from data that does not end: `python -m jobs.stream --config FILE`.

Exit status: 0 the source has ended, and all of it is learnt; 1 failed; 2 bad configuration, or another process works
in the run directory (one line, nothing started); 130, 143, 129 ended by SIGINT, SIGTERM, SIGHUP, after a last snapshot:
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from cluster.controller import RunFailed
from cluster.failures import classify
from cluster.mesh import MeshConfig
from cluster.redaction import one_line
from cluster.text import count
from cluster.tracking.mlflow_model import ModelLogger, load_exported
from jobs.display import PLAIN
from jobs.entry_point import BAD_INPUT, FAILED, run_main
from jobs.options import add_set, override, read_yaml
from jobs.preflight import check_device_of_ranks
from jobs.recording import open_tracker
from jobs.run_directory import default_root, local_folder
from jobs.streaming.config import StreamConfig, parse_stream
from jobs.streaming.job import StreamJob, choose, public, read_config
from jobs.streaming.journal import JournalError
from jobs.streaming.replay import replay
from simmatch.config import ConfigError
from simmatch.devices import check_device
from simmatch.documents import dump_yaml
from simmatch.precision import exact_float32


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        of_a_run = options.replay or options.report
        if options.config is None and not (of_a_run and options.run_dir):
            raise ConfigError("--config: expected a YAML file, or --run-dir with --replay or --report, got nothing")
        config = _config(options)
        base = local_folder("--run-dir", options.run_dir, default_root() / config.name)
        if options.replay:
            return _replay(config, base, console)
        if options.report:
            return _report(config, base, console)
        run_dir = choose(config, base, options.resume)
        if options.dry_run:
            return _dry_run(config, run_dir, console)
        _check_device(config)
        if config.source.lines is not None and not (run_dir / "config.yaml").exists():
            config.source.lines.check()
        if config.source.mqtt is not None:
            config.source.mqtt.password("source.mqtt")
        tracker = open_tracker(run_dir, config.tracking, ModelLogger(load_exported))
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except (JournalError, RunFailed) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED
    return StreamJob(config, run_dir, tracker, console).run()


def _config(options: argparse.Namespace) -> StreamConfig:
    if options.config is None:
        return read_config(Path(options.run_dir))
    local = ["mesh={}"] if options.local else []
    return parse_stream(override(read_yaml(Path(options.config)), [*options.set, *local]))


def _check_device(config: StreamConfig) -> None:
    """Refuse a device that this process, or where they are on this machine the ranks, cannot use.

    Raises
    ------
    ConfigError
        There is none, or fewer than ranks.
    RunFailed
        It is broken, or another process has it for itself.
    """
    if config.mesh.world_size > 1:
        check_device_of_ranks(config.device, config.mesh.world_size * len(config.candidates))
        return
    try:
        check_device(config.device)
    except RuntimeError as error:
        raise RunFailed(f"device: {classify(error).message}") from error


def _replay(config: StreamConfig, run_dir: Path, console: Console) -> int:
    """Apply the journal of a run, and compare with its snapshots."""
    _check_device(config.model_copy(update={"mesh": MeshConfig()}))
    torch.set_num_threads(config.threads)
    exact_float32()
    found = replay(run_dir, config)
    origin = f"the snapshot of batch {found.begun}" if found.begun else "the first entry"
    line = f"{found.entries} entries and {found.batches} batches of the journal from {origin}: digest {found.digest}"
    console.print(line, **PLAIN)
    if found.differing:
        numbers = ", ".join(map(str, found.differing))
        print(f"error: the replay differs from the snapshots of batches {numbers}", file=sys.stderr)
        return FAILED
    console.print(f"equal to the digest of {count(len(found.compared), 'snapshot')}", highlight=False)
    return 0


def _report(config: StreamConfig, run_dir: Path, console: Console) -> int:
    """Write the report of a run, which may be at work."""
    from jobs.streaming.report import report

    try:
        path = report(run_dir, config)
    except OSError as error:
        print(f"error: the report is not written: {one_line(error)}", file=sys.stderr)
        return FAILED
    console.print(str(path), **PLAIN)
    return 0


def _dry_run(config: StreamConfig, run_dir: Path, console: Console) -> int:
    """Print the configuration, and what would be done."""
    console.print(dump_yaml(public(config)).rstrip(), **PLAIN)
    begun = (run_dir / "config.yaml").exists()
    names = ", ".join(config.candidates)
    ranks = config.mesh.world_size * len(config.candidates)
    where = "this process" if config.mesh.world_size == 1 else count(ranks, "rank")
    console.print(
        f"{'continues' if begun else 'begins'} in {run_dir}; source: {config.source.kind}; candidates: {names}; "
        f"layers in {where}, device: {config.device}",
        **PLAIN,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.stream",
        description="Learn from data that does not end: a file that grows, a folder that files arrive in, a broker.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, see jobs/configs/stream*.yaml")
    add_set(parser, "--set batch_size=16 --set source.lines.path=log.csv")
    parser.add_argument("--run-dir", metavar="DIR", help="where the stream's files go (default: runs/<name>)")
    parser.add_argument(
        "--resume",
        default="auto",
        choices=("auto", "never"),
        help="auto (default): go on with the stream that the run directory holds; never: begin a new, numbered one",
    )
    parser.add_argument(
        "--local", action="store_true", help="one process without Ray, whatever mesh says; a mesh of one rank is local"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the configuration, then exit")
    what.add_argument(
        "--replay",
        action="store_true",
        help="apply the journal of a run directory, which nothing else may write, and compare with its snapshots",
    )
    what.add_argument(
        "--report",
        action="store_true",
        help="write report.md, with accuracy, alarms and costs of every candidate, into the run directory",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
