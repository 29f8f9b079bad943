"""The controller: starts a group, polls it, records what it reports, and replaces it when it fails.

It runs in the job's driver process and holds no tensors. `step` is one round, so that tests can drive it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING

from cluster.checkpoints.collector import CheckpointCollector
from cluster.checkpoints.committer import Committer
from cluster.checkpoints.manifest import cursor_of, readable_manifest
from cluster.checkpoints.reader import newest_good
from cluster.config import RunConfig
from cluster.failures import group_failure
from cluster.fence import UNFENCED, AttemptLostError, Unfenced
from cluster.halting import Halting
from cluster.layout import RankInfo, oversubscribed, threads_per_rank
from cluster.messages import Display, GroupStarted, StartingPoint
from cluster.policy import RATE_FACTOR_AFTER_DIVERGENCE, Failure, GroupFailure, Growth, Restart, Stop
from cluster.reports import Reports
from cluster.storage import AnyPath
from cluster.succession import Succession
from cluster.summary import ABANDONED_TAG, RATE_TAG, RunRecord, abandoned, updates_at
from cluster.text import count
from cluster.tracking.tracker import Tracker
from cluster.training import Assignment
from simmatch.config import ConfigError
from simmatch.remote import retry

if TYPE_CHECKING:
    from cluster.group import WorkerGroup  # imports ray, whose environment must be set by then

SETTLE_S = 1.0
"""Longest wait of a round for a commit: a disk takes milliseconds, and what takes longer continues during rounds."""


class RunStopped(RuntimeError):
    """The run ended because it was asked to; the message names its newest checkpoint.

    Attributes
    ----------
    why: for people.
    """

    def __init__(self, message: str, why: str = "asked to end") -> None:
        self.why = why
        super().__init__(message)


class RunFailed(RuntimeError):
    """The run ended without a result; the message is for people."""


class Controller:
    """Runs one job to its end.

    Parameters
    ----------
    config, run_dir: what to run, and where its checkpoints and its model are written.
    make_group: (assignment) → a group that is not started yet.
    recorder, display: where metrics and progress go.
    resume: folder of the checkpoint to continue from, or None.
    before_commit: see `cluster.checkpoints.committer.Committer`.
    data: digest of the data set that all ranks must load, in this process and in every one that continues the run.
    on_config: called with the configuration once its open values are known, see `GroupConfig.threads_per_rank`.
    profile: number of updates of every layer that each rank profiles; 0: none.
    fence: of this attempt at the run.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: AnyPath,
        make_group: Callable[[Assignment], WorkerGroup],
        recorder: Tracker,
        display: Display,
        *,
        resume: AnyPath | None = None,
        before_commit: Callable[[], None] = lambda: None,
        data: str | None = None,
        on_config: Callable[[RunConfig], None] = lambda _: None,
        profile: int = 0,
        fence: Unfenced = UNFENCED,
    ) -> None:
        self.fence = fence
        self.config, self.run_dir, self.resume, self.data, self.on_config = config, run_dir, resume, data, on_config
        self.profile = profile
        self.make_group, self.recorder, self.display = make_group, recorder, display
        manifest = readable_manifest(resume)
        self._images_before = cursor_of(manifest).images
        self.record = RunRecord(rate=1.0 if manifest is None else manifest.rate)
        self._succession = Succession(config, self.record)
        self._halting: Halting | None = None
        self._training = self._learning = self._stop_asked = self._done = self._saved = self._stopped = False
        self._room = 0
        self._terminated: list[int] = []
        self._step = 0
        saving = config.checkpoint
        committer = Committer(run_dir, saving.keep, before_commit, patience_s=saving.patience_s, fence=fence)
        self._checkpoints = CheckpointCollector(committer, display.note, data)
        self._reports = Reports(self.record, self._checkpoints, recorder, display)

    @property
    def finished(self) -> bool:
        """Whether all ranks have finished and the model is published."""
        return self._done and self._checkpoints.model_error is None

    def stop(self) -> bool:
        """Ask for a last checkpoint and an end; may be called from a signal handler.

        Returns whether a group is training: then `run` raises `RunStopped`, within `grace_s`.
        """
        self._stop_asked = self._training
        return self._training

    def run(self) -> RunRecord:
        """Train to the end, with as many groups as the policy allows.

        Raises
        ------
        RunFailed
            The policy decided to stop, or the model could not be published.
        RunStopped
            `stop` was called.
        AttemptLostError
            Another attempt has taken over the run.
        """
        while True:
            config = self.config.at_rate(self.record.rate)
            assignment = Assignment(
                config, self.run_dir, 0, self._succession.generation, self.resume, token_hex(4), self.data, self.profile
            )
            try:
                outcome = self._run_group(assignment)
            except Exception:  # not KeyboardInterrupt and the like, which end the program at once
                self._settle(config.checkpoint.patience_s)
                raise
            self._settle(config.checkpoint.patience_s)
            self._check_owner()
            if outcome is None:
                error = self._checkpoints.model_error
                if error is not None:
                    raise RunFailed(f"the model is not published: {error}; run the same command again to continue")
                return self.record
            if self._stop_asked or (self._halting is not None and self._halting.ends):
                raise RunStopped(outcome.message, self._why)
            decision = self._succession.after(outcome, self.config.mesh.world_size, self._room)
            if isinstance(decision, Stop):
                raise RunFailed(decision.why)
            self._restart(decision, outcome)

    def _restart(self, decision: Restart, outcome: Failure | Growth) -> None:
        """Prepare the next group: its checkpoint, its size and its learning rates."""
        shards = self.config.mesh.world_size
        tags = self._succession.count(decision, outcome, shards)
        self.resume = self._newest_checkpoint() or self.resume
        cursor = cursor_of(readable_manifest(self.resume))
        how = ""
        if decision.shards != shards:
            mesh = self.config.mesh.model_copy(update={"channel": decision.shards})
            self.config = self.config.model_copy(update={"mesh": mesh})
            how = f" of {count(decision.shards, 'rank')}"
            tags |= {"simmatch.world_size": str(decision.shards), "simmatch.mesh": str(self.config.mesh)}
        if decision.lower_rate:
            self.record.rate *= RATE_FACTOR_AFTER_DIVERGENCE
            updates = updates_at(cursor, self.config.model)
            self.record.forget(updates)
            how = f" at {self.record.rate:g} times the learning rates"
            tags |= {RATE_TAG: f"{self.record.rate:g}", ABANDONED_TAG: abandoned(updates)}
        self.record.images = max(0, cursor.images - self._images_before)
        again = max(0, self._step - cursor.step)
        self.record.steps_again += again
        origin = "the beginning" if self.resume is None else self.resume.name
        origin += f", {count(again, 'update')} to repeat" if again else ""
        pause = f" in {decision.after_s:g} s" if decision.after_s else ""
        text = f"{outcome.message}; starting a new group{how} from {origin}{pause}"
        self.display.note(StartingPoint(cursor.step, text))
        self.recorder.tags(tags)
        time.sleep(decision.after_s)

    def _newest_checkpoint(self) -> AnyPath | None:
        """The newest undamaged one. A disk or store that does not answer is asked again for `checkpoint.patience_s`."""
        note, patience_s = self.display.note, self.config.checkpoint.patience_s
        find = partial(newest_good, self.run_dir, note)
        try:
            return retry(find, patience_s, lambda error: note(f"checkpoints cannot be read yet: {error}"), OSError)
        except OSError as error:
            message = f"checkpoints cannot be read: {error}; run the same command again to continue"
            raise RunFailed(message) from error

    def _run_group(self, assignment: Assignment) -> Failure | Growth | None:
        """One group from start to end. Returns None when it has finished."""
        group = self.make_group(assignment)
        self.record.start_group(self._images_before)
        self._step = cursor_of(readable_manifest(assignment.resume)).step
        self._checkpoints.start_group(self._step)
        self._saved, self._stopped, self._halting = False, False, None
        self._room, self._terminated = 0, []
        try:
            group.start(self.display.note)
            self.display.note(GroupStarted(tuple(group.ranks)))
            self._share_cpus(group.ranks)
            self._training, self._learning = True, False
            self._reports.start_group()
            group.watch(self._succession.missing(assignment.config.mesh.world_size))
            self._halting = Halting(group, self.config.cluster.grace_s, self.display.note)
            while True:
                outcome = self._halted(group, self._halting)
                if outcome is not None:
                    return outcome
                done, failure = self.step(group)
                if failure is not None:
                    return self._halting.explain(failure)
                if done and self._stopped:
                    return self._next(self._halting)
                if done:
                    self._done = True
                    return None
                time.sleep(self.config.cluster.poll_s)
        except GroupFailure as error:
            return error.failure if self._halting is None else self._halting.explain(error.failure)
        except ConfigError as error:
            if not self._succession.growing:
                raise
            return Failure(str(error), retryable=False)  # of a node that has come back
        finally:
            self._training = False
            group.end()

    def _share_cpus(self, ranks: list[RankInfo]) -> None:
        """The first group decides on the threads of all: another number would change the last bits."""
        if self.config.cluster.threads_per_rank is None:
            cluster = self.config.cluster.model_copy(update={"threads_per_rank": threads_per_rank(ranks)})
            self.config = self.config.model_copy(update={"cluster": cluster})
            self.on_config(self.config)
        assert self.config.cluster.threads_per_rank is not None
        for line in oversubscribed(ranks, self.config.cluster.threads_per_rank):
            self.display.note(line)

    def _halted(self, group: WorkerGroup, halting: Halting) -> Failure | Growth | None:
        """Ask the ranks for a last checkpoint where there is a reason. Returns why there is a next group, once there is
        nothing left to save; raises RunStopped where the run ends then, or its grace period is over.
        """
        self._room = group.view.spare(group.ranks)
        larger = self._succession.larger(self.config.mesh.world_size, self._room, saved=self._saved)
        growth = larger if self._learning else None
        halt = halting.look(end=self._stop_asked, terminated=self._terminated, larger=growth)
        if halt is None:
            return None
        # before or between layers, once the layer that has ended is saved
        if not self._learning and self._checkpoints.settled_step >= self._step:
            return self._next(halting)
        if not halting.ask():
            raise RunStopped(f"no last checkpoint within {halt.limit_s:g} s", self._why)
        return None

    def _next(self, halting: Halting) -> Failure | Growth:
        """Why there is a next group after ranks that have stopped, or had nothing to save."""
        if self._stop_asked or halting.ends:
            raise RunStopped(self._newest(), self._why)
        return halting.then()

    @property
    def _why(self) -> str:
        """Why the run ends."""
        halt = None if self._halting is None else self._halting.halt
        return "asked to end" if halt is None else halt.message

    def step(self, group: WorkerGroup) -> tuple[bool, Failure | None]:
        """One round: poll every rank and handle its messages. Returns whether all are done, or why they cannot be."""
        statuses = group.poll()
        self._reports.take_in(statuses, group.ranks, self.config)
        self._settle(SETTLE_S)
        self._check_owner()
        self._reports.show(statuses[0].phases)
        latest_phase = statuses[0].progress
        self._learning = latest_phase is not None and latest_phase.phase == "learn"
        if self._learning and self._succession.growing:
            self.recorder.tags(self._succession.learns())
        self._step = max([self._step, *(phase.step for phase in statuses[0].phases if phase.step is not None)])
        self.record.steps = max(self.record.steps, self._step)
        limits = self.config.cluster
        failure = group_failure(statuses, limits.stall_timeout_s, limits.collective_timeout_s)
        if failure is not None:
            return False, failure
        self._terminated = [status.rank for status in statuses if status.terminated]
        self._stopped = any(status.stopped for status in statuses)
        return all(status.done for status in statuses), None

    def _check_owner(self) -> None:
        if self.fence.lost is not None:
            raise AttemptLostError(self.fence.lost)

    def _newest(self) -> str:
        """Where a run that ends now can continue."""
        step = self._checkpoints.committed_step
        if step is not None:
            return f"the newest checkpoint is of step {step}"
        return "no checkpoint was written" if self.resume is None else f"the newest checkpoint is {self.resume.name}"

    def _settle(self, limit_s: float) -> None:
        """Take in the outcomes of commits; a new checkpoint earns new restarts."""
        if self._checkpoints.settle(limit_s):
            self._saved = True
            self._succession.saved()
