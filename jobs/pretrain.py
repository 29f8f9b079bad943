"""Pre-train a stack of similarity-matching layers: `python -m jobs.pretrain --config FILE`.

Exit status: 0 finished, now or before, also where a signal ended the wait for MLflow after that; 1 failed, also where
another attempt took over the run; 2 bad configuration or data, or another attempt is at work (one line, nothing
started); 130, 143, 129 interrupted by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.checkpoints.manifest import CheckpointError
from cluster.config import RunConfig
from cluster.controller import RunFailed
from cluster.fence import Fence
from cluster.holder import Holder
from cluster.redaction import one_line
from cluster.storage import is_local
from cluster.tracking.mlflow_model import ModelLogger, load_exported
from jobs.display import PLAIN, MakeDisplay, RunDisplay, load_shown
from jobs.entry_point import BAD_INPUT, FAILED, run_main
from jobs.finished import report_finished
from jobs.options import add_set, at_least, override, read_yaml
from jobs.plan import print_plan
from jobs.preflight import check, check_checkpoint, check_device_of_ranks, check_surroundings
from jobs.ray_job import SUBMISSION, job_metadata
from jobs.recording import open_tracker
from jobs.run_directory import find_start
from jobs.training_job import TrainingJob
from simmatch.config import ConfigError, parse
from simmatch.data.formats import DataError
from simmatch.profile import WARM_UP

MOST_PROFILED = 100
"""Updates of a layer: one makes thousands of events."""


def main(arguments: list[str] | None = None, make_display: MakeDisplay = RunDisplay) -> int:
    """Parse, build, run. Returns the exit status.

    make_display: makes what shows the progress.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        config = parse(RunConfig, override(read_yaml(Path(options.config)), options.set))
        dataset = check(config, partial(load_shown, console))
        if options.dry_run:
            print_plan(console, config, dataset)
            return 0
        start = find_start(config, options.run_dir, options.resume, partial(console.print, **PLAIN))
        config = start.config
        if start.finished:
            return report_finished(start, dataset, console)
        check_device_of_ranks(config.device, config.mesh.world_size)
        if start.resume is not None:
            check_checkpoint(config, start.resume, dataset)
        for warning in check_surroundings(config, start.destination, dataset):
            print(f"warning: {one_line(warning)}", file=sys.stderr)
        fence = Fence(start.destination, Holder.here(job_metadata().get(SUBMISSION, "")))
        tracker = open_tracker(
            start.run_dir,
            config.tracking,
            ModelLogger(load_exported),
            held=not is_local(start.destination),
            owned=fence.owned,
        )
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED
    job = TrainingJob(config, dataset, start, tracker, console, make_display, fence=fence, profile=options.profile)
    return job.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.pretrain",
        description="Pre-train a stack of similarity-matching layers on Ray, logged to MLflow.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see jobs/configs")
    add_set(parser, "--set mesh.channel=3 --set model.layers.0.out_channels=32")
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where the run's files go: a folder or s3://bucket/prefix (default: runs/<name>)",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto (default): continue an unfinished run of this configuration, or show the result of a finished "
        "one; never: start a new, numbered run; "
        "DIR: start from this run or checkpoint",
    )
    parser.add_argument(
        "--profile",
        type=at_least(1, MOST_PROFILED),
        default=0,
        metavar="N",
        help=f"record N updates of every layer, after its first {WARM_UP}, on every rank: traces in RUN_DIR/profile "
        "and in MLflow, and a table of where the time went; what is learnt does not change",
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration, mesh and sizes, then exit")
    return parser


if __name__ == "__main__":
    run_main(main)
