"""One training run in this process: Ray, the controller, the run's records, and what signals do to it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console

from cluster.checkpoints.manifest import read_manifest
from cluster.config import RunConfig, public
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.messages import StartingPoint
from cluster.redaction import Redactor, one_line
from cluster.summary import RunRecord
from cluster.text import count
from cluster.tracking.spool import SPOOL_NAME, SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.display import JobDisplay, MakeDisplay, RunDisplay
from jobs.entry_point import BAD_INPUT, FAILED
from jobs.mirror import Mirror
from jobs.ray_job import COMMIT, OWNER, job_metadata
from jobs.ray_session import embeds_ray, shut_down_ray, start_ray
from jobs.reporting import git_commit
from jobs.run_directory import RunStart
from jobs.run_results import RunOutcome, RunResults, lines_of, table_of, waits_of
from jobs.signals import Interrupted, SignalHandler, exit_status
from simmatch.config import ConfigError
from simmatch.data.sources import Dataset
from simmatch.documents import dump_yaml
from simmatch.files import make_folder, write_whole


class TrainingJob:
    """Trains, draws figures, writes the summary, and sends the records.

    Parameters
    ----------
    start: the run directory, and the checkpoint to continue from.
    tracker: of this run, not started yet.
    make_display: makes what shows the progress.
    profile: number of updates of every layer to profile; 0: none.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        start: RunStart,
        tracker: Tracker,
        console: Console,
        make_display: MakeDisplay = RunDisplay,
        *,
        profile: int = 0,
    ) -> None:
        self._make_display, self._profile = make_display, profile
        self.config, self.dataset, self.start, self.tracker, self.console = config, dataset, start, tracker, console
        self.run_dir = start.run_dir
        self._hide = Redactor(os.environ)
        patience_s = config.checkpoint.patience_s
        flush = partial(tracker.flush, patience_s)
        self.mirror = Mirror(
            start.destination, start.run_dir, patience_s=patience_s, flush=flush, pushed=tracker.release
        )
        self.results = RunResults(start, dataset, tracker, self.mirror, self._print)
        self.started = time.monotonic()
        self.data = dataset.digest()
        self.record = RunRecord()
        self._controller: Controller | None = None
        self._signals = SignalHandler(self._on_signal)
        self._signum: int | None = None
        self._over = self._uploading = self._unreachable = False

    def run(self) -> int:
        """Train, draw, record. Returns the exit status."""
        try:
            make_folder(self.run_dir)
            self.mirror.pull()
            self._record_start()
            self._write_config(self.config)
            self.mirror.push()
        except SpoolBusyError as error:
            print(f"error: --run-dir: another process works in {self.run_dir}: {error}", file=sys.stderr)
            return BAD_INPUT
        except OSError as error:
            print(f"error: --run-dir: expected a folder that can be written, got {error}", file=sys.stderr)
            return BAD_INPUT
        outcome = RunOutcome("FAILED", FAILED)
        try:
            self._signals.install()  # to the end of the process: the exit status of a finished run must not change
            with self._make_display(self.console, self._hide) as display:
                outcome = self._attempt(display)
        except KeyboardInterrupt:  # `Interrupted`, or what Ray raises in its place
            assert self._signum is not None
            outcome = RunOutcome("KILLED", exit_status(self._signum), str(Interrupted(self._signum)))
        finally:
            self._over = True
            self._close(outcome)
        return outcome.code

    def _attempt(self, display: JobDisplay) -> RunOutcome:
        """Train and draw figures; returns how it ended. From then on a signal only shortens waits."""
        self.tracker.announce_to(display.note)
        try:
            resume = self.start.resume
            start_step = 0 if resume is None else read_manifest(resume).cursor.step
            display.note(StartingPoint(start_step, self.start.note))
            if self.dataset.skipped:
                display.note(f"{count(self.dataset.skipped, 'damaged image')} left out (data.damaged: skip)")
            self._train(display, start_step)
            display.note("drawing figures")
            self.results.draw_figures(self.record)
            return RunOutcome("FINISHED", 0)
        except (RunFailed, ConfigError, OSError) as error:
            self._over = True
            return RunOutcome("FAILED", BAD_INPUT if isinstance(error, ConfigError) else FAILED, self._hide(str(error)))
        except RunStopped as error:
            self._over = True
            signum = self._signum or signal.SIGTERM  # as if its node's end had been signalled
            message = f"{error.why if self._signum is None else Interrupted(signum)}; {error}"
            return RunOutcome("KILLED", exit_status(signum), self._hide(message))

    def _train(self, display: JobDisplay, start_step: int) -> None:
        group = self.config.cluster
        address = start_ray(self.config.mesh.world_size * group.cpus_per_rank, group.start_timeout_s)
        from cluster.group import WorkerGroup  # imports ray, whose environment is set by now

        display.note(f"ray: {address}; mesh: {self.config.mesh}; device: {self.config.device}")
        controller = Controller(
            self.config,
            self.start.destination,
            partial(WorkerGroup, grows=not embeds_ray()),
            self.tracker,
            display,
            resume=self.start.resume,
            before_commit=self.mirror.push,
            data=self.data,
            on_config=partial(self._on_config, display),
            profile=self._profile,
        )
        self._controller, self.record = controller, controller.record
        self.record.steps = start_step
        self.record.continue_from(self.run_dir / SPOOL_NAME)
        try:
            controller.run()
            self._over = True
        except KeyboardInterrupt:
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
        """Write and show the results, then wait for Ray and for MLflow."""
        try:
            summary = self.results.write_summary(self.config, self.record, outcome, time.monotonic() - self.started)
            tables = self.results.write_profiles(self.record, self._profile)
            if outcome.message is not None:
                print(f"error: {one_line(outcome.message)}", file=sys.stderr)
            for table in tables:
                table.show(self.console)
            if outcome.status == "FINISHED":
                table_of(self.config.name, summary).show(self.console)
                for line in (
                    *lines_of(summary),
                    *waits_of(summary),
                    f"model, figures, summary: {self.start.destination}",
                ):
                    self._print(line)
            self._upload(self.mirror.close)
        finally:
            shut_down_ray()
            self.results.send()
            self._upload(self.mirror.push)

    def _upload(self, upload: Callable[[], None]) -> None:
        """Copy records to the run directory. A signal ends the wait for it; after a failure it is not tried again."""
        if self._unreachable:
            return
        try:
            self._uploading = True
            upload()
        except (Interrupted, OSError) as error:
            self._unreachable = True
            self._print(f"the last records are in {self.run_dir} only: {one_line(error)}")
        finally:
            self._uploading = False

    def _print(self, text: str) -> None:
        """A line after the display has ended."""
        self.console.print(self._hide(text), markup=False, highlight=False, soft_wrap=True)

    def _on_signal(self, signum: int) -> None:
        """While ranks train, the first signal asks for a last checkpoint and the next one ends the run.

        Before that any signal ends the run. Once training is over, signals end waits.
        """
        if self._over:
            self.tracker.hurry()
            if self._uploading:
                self._uploading = False
                raise Interrupted(signum)
        elif self._signum is None and self._controller is not None and self._controller.stop():
            self._signum = signum
        elif not signum == self._signum == signal.SIGHUP:  # a closed terminal sends two: the system's and the shell's
            self._signum, self._over = signum, True
            raise Interrupted(signum)

    def _record_start(self) -> None:
        """Record what is known before the first step."""
        config, tracker, given = self.config, self.tracker, job_metadata()
        tags = {
            "simmatch.git_commit": given.get(COMMIT) or git_commit() or "unknown",
            "simmatch.world_size": str(config.mesh.world_size),
            "simmatch.mesh": str(config.mesh),
            "simmatch.host": os.uname().nodename,
            "simmatch.device": config.device,
            "simmatch.skipped_images": str(self.dataset.skipped),
        }
        if given.get(OWNER):  # a job runs as a user of the cluster
            tags["mlflow.user"] = given[OWNER]
        tracker.start(self.run_dir.name, layers=len(config.model.layers), tags=tags)
        values = public(config)
        layers = values["model"].pop("layers")
        tracker.params({key: value for key, value in values.items() if key not in ("tracking", "cluster", "mesh")})
        for index, layer in enumerate(layers):
            tracker.params(layer, layer=index)
        name, images = self.dataset.name, len(self.dataset.train_images)
        tracker.dataset(name, source=name, digest=self.data, num_images=images)

    def _write_config(self, config: RunConfig) -> None:
        """Write `config.yaml` into the run directory, and log it to MLflow."""
        path = self.run_dir / "config.yaml"
        write_whole(path, dump_yaml(public(config)))
        self.tracker.artifact(path)
