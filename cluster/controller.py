"""The controller: starts a group, polls it, keeps its records, commits checkpoints, decides on failures.

It runs in the job's driver process and never touches a tensor. `step` is one round, so that tests can drive it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from secrets import token_hex
from typing import Protocol, assert_never

from cluster.checkpoints.committer import Committer
from cluster.checkpoints.manifest import CheckpointError, Cursor, Manifest, Shard, read_manifest
from cluster.checkpoints.reader import newest_good
from cluster.config import RunConfig, public
from cluster.cpus import oversubscribed, threads_per_rank
from cluster.failures import group_failure
from cluster.messages import (
    GroupStarted,
    LayerMetrics,
    Message,
    ModelExported,
    Note,
    OfTheRun,
    Progress,
    RankInfo,
    RankStatus,
    ReadoutScored,
    ShardFailed,
    ShardWritten,
    StartingPoint,
    Traceback,
    TrainingWarning,
)
from cluster.policy import RATE_FACTOR_AFTER_DIVERGENCE, Failure, FailurePolicy, Restart, Stop
from cluster.storage import AnyPath
from cluster.summary import ABANDONED_TAG, RunRecord, abandoned
from cluster.training import Assignment

SETTLE_S = 1.0
"""Longest pause of a round for a commit: a disk takes milliseconds, and what takes longer goes on beside the rounds."""


class Group(Protocol):
    """What the controller needs of `cluster.group.WorkerGroup`."""

    ranks: list[RankInfo]

    def start(self) -> None: ...

    def poll(self) -> list[RankStatus]: ...

    def stop(self) -> None: ...

    def end(self) -> None: ...


class Recorder(Protocol):
    """What the controller needs of `cluster.tracking.tracker.Tracker`."""

    def metrics(
        self, step: int, values: dict[str, float], layer: int | None = None, time_s: float | None = None
    ) -> None: ...

    def tags(self, values: dict[str, str]) -> None: ...


class Display(Protocol):
    """Where a person watches."""

    def progress(self, latest: Progress) -> None: ...

    def note(self, note: Note) -> None: ...


class RunStopped(RuntimeError):
    """The run ended because it was asked to; the message says from where it can go on."""


class RunFailed(RuntimeError):
    """The run ended without a result; the message is for people."""


class Controller:
    """Runs one job to its end.

    Parameters
    ----------
    config, run_dir: what to run, and where its checkpoints and its model go.
    make_group: (assignment) → a group that is not started yet.
    recorder, display: where metrics and progress go.
    resume: folder of the checkpoint to continue from, or None.
    before_commit: see `cluster.checkpoints.committer.Committer`.
    data: digest of the data set that all ranks must find, on this attempt and on every one that continues it.
    settle: given the configuration once what it left open is known, see `GroupConfig.threads_per_rank`.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: AnyPath,
        make_group: Callable[[Assignment], Group],
        recorder: Recorder,
        display: Display,
        *,
        resume: AnyPath | None = None,
        before_commit: Callable[[], None] = lambda: None,
        data: str | None = None,
        settle: Callable[[RunConfig], None] = lambda _: None,
    ) -> None:
        self.config, self.run_dir, self.resume, self.data, self.settle = config, run_dir, resume, data, settle
        self.make_group, self.recorder, self.display = make_group, recorder, display
        group = config.cluster
        self.policy = FailurePolicy(group.max_restarts, group.min_shards, group.backoff_s, config.divergence)
        manifest = _known(resume)
        self.rate = 1.0 if manifest is None else manifest.rate
        self._images_before = 0 if manifest is None else manifest.cursor.images
        self.record = RunRecord()
        self._in_vain = 0
        self._training = self._asked = self._done = False
        self._deadline: float | None = None
        self._saved: int | None = None
        self._model_lost: str | None = None
        self._step = self._settled = 0
        self._progress: Progress | None = None
        self._shown = 0
        self._shards: dict[int, dict[int, Shard]] = {}
        saving = config.checkpoint
        self._committer = Committer(run_dir, saving.keep, before_commit, patience_s=saving.patience_s)
        self._before = (0.0, 0.0)

    @property
    def finished(self) -> bool:
        """Whether all ranks have come to the end of the program, and the model is where it belongs."""
        return self._done and self._model_lost is None

    def stop(self) -> bool:
        """Ask for a last checkpoint and an end; may be called from a signal handler.

        Returns whether there is something to wait for: then `run` raises `RunStopped`, after `grace_s` at the latest.
        """
        self._asked = self._training
        return self._training

    def run(self) -> RunRecord:
        """Train to the end, over as many groups as the policy allows.

        Raises
        ------
        RunFailed
            The policy said stop.
        RunStopped
            `stop` was called.
        """
        while True:
            config = at_rate(self.config, self.rate)
            assignment = Assignment(config, self.run_dir, 0, self.record.restarts, self.resume, token_hex(4), self.data)
            try:
                failure = self._run_group(assignment)
            except Exception:  # not what ends the program at once
                self._settle(config.checkpoint.patience_s)
                raise
            self._settle(config.checkpoint.patience_s)
            if failure is None:
                if self._model_lost is not None:
                    raise RunFailed(f"the model is not published: {self._model_lost}; the same command goes on")
                return self.record
            if self._asked:
                raise RunStopped(failure.message)
            shards = self.config.checked_mesh().world_size
            decision = self.policy.decide(failure, self._in_vain, shards, lowered=self.rate < 1)
            if isinstance(decision, Stop):
                raise RunFailed(decision.why)
            self._restart(decision, failure)

    def _restart(self, decision: Restart, failure: Failure) -> None:
        """Make ready for the next group, and say so."""
        self.record.restarts += 1
        self._in_vain += 1
        self.resume = self._look_for_checkpoint()
        self._shards.clear()
        tags = {"restarts": str(self.record.restarts)}
        how = ""
        if decision.shards != self.config.checked_mesh().world_size:
            mesh = self.config.mesh.model_copy(update={"channel": decision.shards})
            self.config = self.config.model_copy(update={"mesh": mesh})
            how = f" of {decision.shards}"
            tags |= {"simmatch.world_size": str(decision.shards), "simmatch.mesh": str(self.config.checked_mesh())}
        if decision.lower_rate:
            self.rate *= RATE_FACTOR_AFTER_DIVERGENCE
            how = f" at {self.rate:g} of the learning rates"
            tags |= {"simmatch.rate": f"{self.rate:g}"}
        origin = "the beginning" if self.resume is None else self.resume.name
        manifest = _known(self.resume)
        cursor = Cursor(step=0, layer=0, updates=0) if manifest is None else manifest.cursor
        if decision.lower_rate:
            self.record.forget(cursor)
            tags[ABANDONED_TAG] = abandoned(cursor)
        self.record.images = max(0, cursor.images - self._images_before)
        again = max(0, self._step - cursor.step)
        self.record.steps_again += again
        origin += f", {again} updates again" if again else ""
        pause = f" in {decision.after_s:g} s" if decision.after_s else ""
        text = f"{failure.message}; starting a new group{how} from {origin}{pause}"
        self.display.note(StartingPoint(cursor.step, text))
        self.recorder.tags(tags)
        time.sleep(decision.after_s)

    def _look_for_checkpoint(self) -> AnyPath | None:
        """The newest sound one. A store that does not answer is asked again for as long as checkpoints may take."""
        deadline = time.monotonic() + self.config.checkpoint.patience_s
        while True:
            try:
                return newest_good(self.run_dir, self.display.note) or self.resume
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RunFailed(f"checkpoints cannot be read: {error}; the same command goes on") from error
                self.display.note(f"checkpoints cannot be read yet: {error}")
                time.sleep(self.config.cluster.backoff_s)

    def _run_group(self, assignment: Assignment) -> Failure | None:
        """One group from start to end; None when it finished."""
        from cluster.group import GroupFailure  # imports ray, which a test of the controller need not

        group = self.make_group(assignment)
        self._before = (self.record.bytes_exchanged, self.record.num_exchanges)
        manifest = _known(assignment.resume)
        self._step = self._settled = 0 if manifest is None else manifest.cursor.step
        try:
            group.start()
            self.display.note(GroupStarted(tuple(group.ranks)))
            self._share_cpus(group.ranks)
            self._training, self._progress, self._shown = True, None, 0
            while True:
                self._ask_to_stop(group)
                done, failure = self.step(group)
                if done or failure is not None:
                    self._done = failure is None
                    return failure
                time.sleep(self.config.cluster.poll_s)
        except GroupFailure as error:
            return error.failure
        finally:
            self._training = False
            group.end()

    def _share_cpus(self, ranks: list[RankInfo]) -> None:
        """Threads are counted once, by the first group: another count would change the last bits."""
        if self.config.cluster.threads_per_rank is None:
            cluster = self.config.cluster.model_copy(update={"threads_per_rank": threads_per_rank(ranks)})
            self.config = self.config.model_copy(update={"cluster": cluster})
            self.settle(self.config)
        assert self.config.cluster.threads_per_rank is not None
        for line in oversubscribed(ranks, self.config.cluster.threads_per_rank):
            self.display.note(line)

    def _ask_to_stop(self, group: Group) -> None:
        """Once asked for: tell the ranks; when the time is up, end without them."""
        if not self._asked:
            return
        grace_s = self.config.cluster.grace_s
        learning = self._progress is not None and self._progress.phase == "learn"
        if not learning and self._settled >= self._step:  # a layer is done and saved, or none has begun
            raise RunStopped(self._newest())
        if self._deadline is None:
            self._deadline = time.monotonic() + grace_s
            self.display.note(f"asked to end: waiting at most {grace_s:g} s for a last checkpoint")
            group.stop()
        elif time.monotonic() > self._deadline:
            raise RunStopped(f"no last checkpoint within {grace_s:g} s")

    def step(self, group: Group) -> tuple[bool, Failure | None]:
        """One round: ask every rank, keep what they say. Returns whether all are done, and why they cannot be."""
        statuses = group.poll()
        for status in statuses:
            for message in status.messages:
                self._handle(status.rank, message)
        self._settle(SETTLE_S)
        for latest in statuses[0].phases[self._shown :]:  # what ended since is told as well, whatever the interval
            self.display.progress(latest)
        self._shown = max(0, len(statuses[0].phases) - 1)
        self._progress = statuses[0].progress
        self._step = max([self._step, *(phase.step for phase in statuses[0].phases if phase.step is not None)])
        self.record.steps = max(self.record.steps, self._step)
        failure = group_failure(statuses, self.config.cluster.stall_timeout_s)
        if failure is not None:
            return False, failure
        done = all(status.done for status in statuses)
        if done and any(status.stopped for status in statuses):
            raise RunStopped(self._newest())
        return done, None

    def _newest(self) -> str:
        """From where a run that ends now can go on."""
        if self._saved is not None:
            return f"the newest checkpoint is of step {self._saved}"
        return "no checkpoint was written" if self.resume is None else f"the newest checkpoint is {self.resume.name}"

    # ----------------------------------------------------------------------------------------- messages

    def _handle(self, rank: int, message: Message) -> None:
        match message:
            case ShardWritten():
                self._shard(rank, message)
            case ShardFailed(step, reason):
                self._shards.pop(step, None)
                self._settled = max(self._settled, step)
                self.display.note(f"rank {rank}: the checkpoint of step {step} is left out: {reason}")
            case Traceback(text):
                self.display.note(f"rank {rank}:\n{text}")
            case LayerMetrics() | TrainingWarning() | ModelExported() | ReadoutScored():
                if rank == 0:
                    self._handle_once(message)
            case _:
                assert_never(message)

    def _handle_once(self, message: OfTheRun) -> None:
        """What all ranks report alike."""
        match message:
            case LayerMetrics():
                self._metrics(message)
            case TrainingWarning(text):
                self.display.note(f"warning: {text}")
            case ModelExported(folder):
                self._model_lost = "no answer"
                self._committer.submit(folder)
            case ReadoutScored():
                self.record.readout = message
            case _:
                assert_never(message)

    def _metrics(self, metrics: LayerMetrics) -> None:
        """Record the metrics of a layer; exchanges are counted on from those of earlier groups."""
        record, (bytes_before, exchanges_before) = self.record, self._before
        record.images = metrics.images - self._images_before
        record.bytes_exchanged = bytes_before + metrics.bytes_exchanged
        record.num_exchanges = exchanges_before + metrics.num_exchanges
        totals = {"bytes_exchanged": record.bytes_exchanged, "num_exchanges": record.num_exchanges}
        values = metrics.values() | totals
        record.layers[metrics.layer] = values
        curve = record.curves.setdefault(metrics.layer, [])
        if curve and metrics.update <= curve[-1][0]:
            return  # recorded before a restart
        curve.append((metrics.update, values))
        self.recorder.metrics(metrics.update, values, layer=metrics.layer)

    def _shard(self, rank: int, written: ShardWritten) -> None:
        """Commit a checkpoint when the last rank has written its part."""
        cursor = written.cursor
        self.record.steps = max(self.record.steps, cursor.step)
        shards = self._shards.setdefault(cursor.step, {})
        shards[rank] = written.shard
        if len(shards) < self.config.checked_mesh().world_size:
            return
        manifest = Manifest(
            cursor=cursor,
            config=public(self.config),
            layers=written.layers,
            shards=[shards[number] for number in sorted(shards)],
            rate=self.rate,
            data=self.data,
        )
        del self._shards[cursor.step]
        self._committer.submit(manifest)

    def _settle(self, limit_s: float) -> None:
        """Hear what became of checkpoints that are being committed."""
        for outcome in self._committer.settled(limit_s):
            if outcome.step is None:
                self._model_lost = outcome.reason
                continue
            self._settled = max(self._settled, outcome.step)
            if outcome.reason is None:
                self._in_vain, self._saved = 0, outcome.step
            else:
                self.display.note(f"the checkpoint of step {outcome.step} is left out: {outcome.reason}")


def _known(checkpoint: AnyPath | None) -> Manifest | None:
    """A checkpoint's manifest; one that cannot be read is the ranks' to refuse."""
    try:
        return None if checkpoint is None else read_manifest(checkpoint)
    except (CheckpointError, OSError):
        return None


def at_rate(config: RunConfig, rate: float) -> RunConfig:
    """The configuration with all learning rates multiplied."""
    if rate == 1.0:
        return config
    layers = tuple(
        layer.model_copy(update={"plasticity": layer.plasticity.model_copy(update={"lr": rate * layer.plasticity.lr})})
        for layer in config.model.layers
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": layers})})
