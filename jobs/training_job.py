"""One training run in this process: Ray, the controller, the run's records, and what signals do to it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from rich.console import Console

from cluster.checkpoints.committer import complete_commit
from cluster.checkpoints.manifest import read_manifest
from cluster.config import RunConfig, public
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.fence import AttemptLostError, Fence
from cluster.lease import LeaseKeeper
from cluster.messages import StartingPoint
from cluster.redaction import Redactor, one_line
from cluster.summary import RunRecord
from cluster.text import count
from cluster.tracking.spool import SPOOL_NAME, Spool, SpoolBusyError
from cluster.tracking.tracker import Tracker
from jobs.display import PLAIN, JobDisplay, MakeDisplay, RunDisplay
from jobs.entry_point import BAD_INPUT, FAILED
from jobs.mirror import Mirror
from jobs.origin import program_commit, source_tags
from jobs.ray_job import COMMIT
from jobs.ray_session import embeds_ray, shut_down_ray, start_ray
from jobs.run_directory import RunStart, continued
from jobs.run_results import RunOutcome, RunResults, description_of, lines_of, table_of, waits_of
from jobs.signals import CONTINUES, Interrupted, SignalHandler, exit_status
from simmatch.config import ConfigError
from simmatch.data.sources import Dataset
from simmatch.documents import dump_yaml
from simmatch.files import make_folder, write_whole
from simmatch.remote import retry


class TrainingJob:
    """Trains, draws figures, writes the summary, and sends the records.

    Parameters
    ----------
    start: the run directory, and the checkpoint to continue from.
    tracker: of this run, not started yet.
    make_display: makes what shows the progress.
    fence: of this attempt at the run, not begun yet.
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
        fence: Fence,
        profile: int = 0,
    ) -> None:
        self.fence, self._lease = fence, LeaseKeeper(start.destination, fence)
        self._make_display, self._profile = make_display, profile
        self.config, self.dataset, self.start, self.tracker, self.console = config, dataset, start, tracker, console
        self.run_dir = start.run_dir
        self._hide = Redactor(os.environ)
        patience_s = config.checkpoint.patience_s
        flush = partial(tracker.flush, patience_s)
        self.mirror = Mirror(
            start.destination, start.run_dir, patience_s=patience_s, flush=flush, pushed=tracker.release, fence=fence
        )
        self.results = RunResults(start, dataset, tracker, self.mirror, self._print)
        self.started = time.monotonic()
        self.data = dataset.digest()
        self.record = RunRecord()
        self._controller: Controller | None = None
        self._signals = SignalHandler(self._on_signal)
        self._signum: int | None = None
        self._due_end: Callable[[], None] | None = None
        self._over = self._uploading = self._unreachable = False

    def run(self) -> int:
        """Train, draw, record. Returns the exit status."""
        try:
            self._begin()
            self.mirror.pull()
            self._record_start()
            self._write_config(self.config)
            self.mirror.push()
        except AttemptLostError:
            return self._refuse(f"another attempt has begun in {self.start.destination}: {self.fence.winner}")
        except SpoolBusyError as error:
            return self._refuse(f"another process works in {self.run_dir}: {error}")
        except OSError as error:
            return self._refuse(f"expected a folder that can be written, got {error}")
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
            if self._end(outcome):
                self._close(outcome)
            else:
                outcome = self._lose()
            self._lease.release()
        return outcome.code

    def _begin(self) -> None:
        """Take the run, with what an attempt has left that did not end it."""
        make_folder(self.run_dir)
        before = self.fence.begin(self.start.newest)
        self._lease.start()
        if before is not None and before.kind != "end":
            Spool(self.run_dir / SPOOL_NAME).take_over()
        if complete_commit(self.start.destination, before):
            self.start = continued(self.start.config, self.start.destination, "continuing the unfinished run in", [])

    def _refuse(self, reason: str) -> int:
        """End before anything was started; returns the exit status."""
        print(f"error: --run-dir: {reason}", file=sys.stderr)
        with suppress(AttemptLostError, OSError):
            self.fence.commit("end", status="FAILED")
        self._lease.release()
        return BAD_INPUT

    def _end(self, outcome: RunOutcome) -> bool:
        """Record the end; returns whether the run is still this process's. A store that does not answer says nothing:
        it is asked again when the last records are copied there."""
        self._due_end = partial(self.fence.commit, "end", status=outcome.status)
        with suppress(OSError):
            try:
                self._due_end()
                self._due_end = None
            except AttemptLostError:
                return False
        return True

    def _copy_rest(self) -> None:
        if self._due_end is not None and self.mirror.remote:
            retry(self._due_end, self.config.checkpoint.patience_s)
        self.mirror.close()

    def _lose(self) -> RunOutcome:
        """Another attempt has taken over the run: nothing is written and nothing sent any more."""
        print(f"error: {self.fence.lost}", file=sys.stderr)
        self.tracker.abandon()
        shut_down_ray()
        return RunOutcome("FAILED", FAILED, self.fence.lost)

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
            self.fence.check()
            display.note("drawing figures")
            self.results.draw_figures(self.record)
            return RunOutcome("FINISHED", 0)
        except (RunFailed, AttemptLostError, ConfigError, OSError) as error:
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
            fence=self.fence,
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
            if outcome.status == "KILLED":
                self._print(f"{CONTINUES} (--resume auto, the default)")
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
            self._upload(self._copy_rest)
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
        except (Interrupted, OSError, AttemptLostError) as error:
            self._unreachable = True
            self._print(f"the last records are in {self.run_dir} only: {one_line(error)}")
        finally:
            self._uploading = False

    def _print(self, text: str) -> None:
        """A line after the display has ended."""
        self.console.print(self._hide(text), **PLAIN)

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
        config, tracker, commit = self.config, self.tracker, program_commit()
        tags = source_tags(commit) | {
            "mlflow.note.content": description_of(config, self.dataset),
            COMMIT: commit,
            "simmatch.world_size": str(config.mesh.world_size),
            "simmatch.mesh": str(config.mesh),
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
        """Write `config.yaml` into the run directory, and log it to MLflow."""
        self.fence.check()
        path = self.run_dir / "config.yaml"
        write_whole(path, dump_yaml(public(config)))
        self.tracker.artifact(path)
