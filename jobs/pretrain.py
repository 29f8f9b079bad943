"""Pre-train a stack of similarity-matching layers: `python -m jobs.pretrain --config FILE`.

Exit status: 0 finished, also where a signal ended the wait for MLflow after that; 1 failed; 2 bad configuration or data
(one line, nothing started); 130, 143, 129 interrupted by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from cluster.checkpoints.manifest import CheckpointError, read_manifest
from cluster.config import RunConfig, public
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.messages import StartingPoint
from cluster.redaction import Redactor, one_line
from cluster.storage import is_local
from cluster.summary import RunRecord
from cluster.text import count
from cluster.tracking.mlflow_model import ModelLogger, load_exported
from cluster.tracking.spool import SPOOL_NAME, SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.checks import check, check_checkpoint
from jobs.closing import Closing, RunOutcome, lines_of, table_of
from jobs.display import JobDisplay, MakeDisplay, RunDisplay
from jobs.ending import asking_to_end, status_of
from jobs.mirror import Mirror
from jobs.options import override, read_yaml
from jobs.plan import print_plan
from jobs.program import run_program
from jobs.ray_session import shut_down_ray, start_ray
from jobs.reporting import git_commit
from jobs.run_directory import RunStart, as_begun, choose
from simmatch.config import ConfigError, parse
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset
from simmatch.documents import dump_yaml
from simmatch.files import make_folder, write_whole

BAD_INPUT = 2


def main(arguments: list[str] | None = None, make_display: MakeDisplay = RunDisplay) -> int:
    """Parse, build, run. Returns the exit status.

    make_display: where a person, or a program, watches.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        config = parse(RunConfig, override(read_yaml(Path(options.config)), options.set))
        dataset = check(config)
        if options.dry_run:
            print_plan(console, config, dataset.source, len(dataset.train_images))
            return 0
        start = as_begun(choose(config, options.run_dir, options.resume))
        config = start.config
        if start.resume is not None:
            check_checkpoint(config, start.resume, dataset)
        tracker = Tracker(
            start.run_dir, config.tracking, ModelLogger(load_exported), held=not is_local(start.destination)
        )
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return Job(config, dataset, start, tracker, console, make_display).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.pretrain",
        description="Pre-train a stack of similarity-matching layers on Ray, logged to MLflow.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see jobs/configs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. --set mesh.channel=3 --set model.layers.0.out_channels=32; repeatable",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where the run's files go: a folder or s3://bucket/prefix (default: runs/<name>)",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue an unfinished run of this configuration; never: a new run; DIR: a run or a checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration, mesh and sizes; start nothing")
    return parser


class Job:
    """One run in this process: Ray, the controller, the records."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        start: RunStart,
        tracker: Tracker,
        console: Console,
        make_display: MakeDisplay = RunDisplay,
    ) -> None:
        self._make_display = make_display
        self.config, self.dataset, self.start, self.tracker, self.console = config, dataset, start, tracker, console
        self.run_dir = start.run_dir
        self._hide = Redactor(os.environ)
        patience_s = config.checkpoint.patience_s
        flush = partial(tracker.flush, patience_s)
        self.mirror = Mirror(
            start.destination, start.run_dir, patience_s=patience_s, flush=flush, pushed=tracker.release
        )
        self.closing = Closing(start, dataset, tracker, self.mirror, self._tell)
        self.started = time.monotonic()
        self.data = dataset.digest()
        self.record = RunRecord()
        self._controller: Controller | None = None
        self._signum: int | None = None
        self._over = self._bringing = self._away = False

    def run(self) -> int:
        """Train, look at the result, record it. Returns the exit status."""
        try:
            make_folder(self.run_dir)
            self.mirror.pull()
            self._describe()
            self._write_config(self.config)
            self.mirror.push()
        except SpoolBusyError as error:
            print(f"error: --run-dir: another process works in {self.run_dir}: {error}", file=sys.stderr)
            return BAD_INPUT
        except OSError as error:
            print(f"error: --run-dir: expected a folder that can be written, got {error}", file=sys.stderr)
            return BAD_INPUT
        outcome = RunOutcome("FAILED", 1)
        try:
            self._watch_signals()
            with self._make_display(self.console, self._hide) as display:
                outcome = self._attempt(display)
        except Interrupted as error:
            outcome = RunOutcome("KILLED", status_of(error.signum), str(error))
        finally:
            self._over = True
            self._close(outcome)
        return outcome.code

    def _attempt(self, display: JobDisplay) -> RunOutcome:
        """Train, and say what became of it; from here on a signal only cuts waits short."""
        self.tracker.announce_to(display.note)
        try:
            resume = self.start.resume
            start_step = 0 if resume is None else read_manifest(resume).cursor.step
            display.note(StartingPoint(start_step, self.start.note))
            if self.dataset.skipped:
                display.note(f"{count(self.dataset.skipped, 'damaged image')} left out (data.damaged: skip)")
            self._train(display, start_step)
            display.note("drawing figures")
            self.closing.draw_figures(self.record)
            return RunOutcome("FINISHED", 0)
        except (RunFailed, ConfigError, OSError) as error:
            self._over = True
            return RunOutcome("FAILED", BAD_INPUT if isinstance(error, ConfigError) else 1, self._hide(str(error)))
        except RunStopped as error:
            self._over = True
            assert self._signum is not None
            why = f"{Interrupted(self._signum)}; {error}"
            return RunOutcome("KILLED", status_of(self._signum), self._hide(why))

    def _train(self, display: JobDisplay, start_step: int) -> None:
        group = self.config.cluster
        address = start_ray(self.config.checked_mesh().world_size * group.cpus_per_rank, group.start_timeout_s)
        from cluster.group import WorkerGroup  # imports ray, whose environment is set by now

        display.note(f"ray: {address}; mesh: {self.config.checked_mesh()}; device: {self.config.device}")
        controller = Controller(
            self.config,
            self.start.destination,
            WorkerGroup,
            self.tracker,
            display,
            resume=self.start.resume,
            before_commit=self.mirror.push,
            data=self.data,
            on_config=partial(self._on_config, display),
        )
        self._controller, self.record = controller, controller.record
        self.record.steps = start_step
        self.record.continue_from(self.run_dir / SPOOL_NAME)
        try:
            controller.run()
            self._over = True
        except Interrupted:
            if not controller.finished:
                raise
        finally:
            self._controller, self.config = None, controller.config  # the mesh may have shrunk

    def _on_config(self, display: JobDisplay, config: RunConfig) -> None:
        """The open values of the configuration are known; checkpoints hold them as well."""
        try:
            self._write_config(config)
        except OSError as error:
            display.note(f"config.yaml is not written: {error}")

    def _close(self, outcome: RunOutcome) -> None:
        """RunRecord, show, and only then wait: for Ray, and for MLflow."""
        try:
            summary = self.closing.record(self.config, self.record, outcome, time.monotonic() - self.started)
            if outcome.message is not None:
                print(f"error: {one_line(outcome.message)}", file=sys.stderr)
            if outcome.status == "FINISHED":
                table_of(self.config.name, summary).show(self.console)
                for line in (*lines_of(summary), f"model, figures, summary: {self.start.destination}"):
                    self._tell(line)
            self._bring(self.mirror.close)
        finally:
            shut_down_ray()
            self.closing.wait()
            self._bring(self.mirror.push)

    def _bring(self, bring: Callable[[], None]) -> None:
        """Bring records to the run's place. A signal ends the wait for it; one that was away is not asked again."""
        if self._away:
            return
        try:
            self._bringing = True
            bring()
        except (Interrupted, OSError) as error:
            self._away = True
            self._tell(f"the last records are in {self.run_dir} only: {one_line(error)}")
        finally:
            self._bringing = False

    def _tell(self, text: str) -> None:
        """A line of the mirror, which works beside the display."""
        self.console.print(self._hide(text), markup=False, highlight=False, soft_wrap=True)

    def _watch_signals(self) -> None:
        for signum in asking_to_end():
            signal.signal(signum, self._interrupt)

    def _interrupt(self, signum: int, _: FrameType | None) -> None:
        """The first signal asks for a last checkpoint where ranks train; the next one, or any elsewhere, ends the run.

        Once it is over, whatever became of it, signals end waits.
        """
        if self._over:
            self.tracker.hurry()
            if self._bringing:
                self._bringing = False
                raise Interrupted(signum)
        elif self._signum is None and self._controller is not None and self._controller.stop():
            self._signum = signum
        elif not signum == self._signum == signal.SIGHUP:  # of a closed terminal both the system and the shell tell
            self._over = True
            raise Interrupted(signum)

    # ------------------------------------------------------------------------------------------- records

    def _describe(self) -> None:
        """What is known before the first step."""
        config, tracker = self.config, self.tracker
        tags = {
            "simmatch.git_commit": git_commit() or "unknown",
            "simmatch.world_size": str(config.checked_mesh().world_size),
            "simmatch.mesh": str(config.checked_mesh()),
            "simmatch.host": os.uname().nodename,
            "simmatch.device": config.device,
            "simmatch.skipped_images": str(self.dataset.skipped),
        }
        tracker.start(self.run_dir.name, layers=len(config.model.layers), tags=tags)
        values = public(config)
        layers = values["model"].pop("layers")
        tracker.params({key: value for key, value in values.items() if key not in ("tracking", "cluster", "mesh")})
        for index, layer in enumerate(layers):
            tracker.params(layer, layer=index)
        name, images = self.dataset.name, len(self.dataset.train_images)
        tracker.dataset(name, source=name, digest=self.data, num_images=images)

    def _write_config(self, config: RunConfig) -> None:
        """Into the run directory, and from there to MLflow."""
        path = self.run_dir / "config.yaml"
        write_whole(path, dump_yaml(public(config)))
        self.tracker.artifact(path)


class Interrupted(BaseException):
    """A signal asked the job to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"ended by {signal.Signals(signum).name}")


if __name__ == "__main__":
    run_program(main)
