"""The controller against a group whose every answer is scripted: no Ray, no processes, no tensors."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import cluster.controller
import simmatch.remote
from cluster.allocation import Allocation
from cluster.checkpoints.manifest import MANIFEST, Cursor, LayerState, Manifest, Shard, folder_of, read_manifest
from cluster.checkpoints.reader import newest_good
from cluster.config import RunConfig
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.departures import ClusterView
from cluster.layout import RankInfo
from cluster.messages import (
    LayerMetrics,
    Message,
    ModelExported,
    NodeWarning,
    Note,
    Outbox,
    Phase,
    Progress,
    RankStatus,
    ReadoutScored,
    ShardFailed,
    ShardWritten,
    Traceback,
    TrainingWarning,
)
from cluster.policy import LONGEST_PAUSE_S, Failure, FailurePolicy, GroupFailure, Restart, Stop
from cluster.summary import ABANDONED, RunRecord, abandoned, summarise, updates_at
from cluster.tracking.events import MetricsEvent, ParamsEvent, TagsEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.training import Assignment
from simmatch.config import ConfigError, LayerConfig, ModelConfig, TrainConfig
from simmatch.documents import dump_json
from simmatch.files import write_whole

Round = list[list[Message]] | Failure | Callable[[], Failure]
"""One answer to a poll: every rank's new messages, or the failure that the group raises, perhaps after an action."""

LOST = Failure("rank 1 (pid 7 on node) was lost", retryable=True)
FAULT = Failure("TrainingFault: layer 0, step 3: non-finite activities on rank 1", retryable=False)


class ScriptedGroup:
    """Answers polls from a script; an empty list of rounds means that all ranks are done."""

    def __init__(self, assignment: Assignment, rounds: list[Round], start: BaseException | None = None) -> None:
        self.assignment, self.rounds, self.failure = assignment, list(rounds), start
        self.ranks: list[RankInfo] = []
        self.calls: list[str] = []
        self.cpus = 8
        self.view = ClusterView()
        self.missing: int | None = None

    def watch(self, missing: int) -> None:
        self.missing = missing

    def start(self, note: Callable[[str], None]) -> None:
        self.calls.append("start")
        if self.failure is not None:
            raise self.failure
        self.ranks = [RankInfo(rank, 6 + rank, Allocation("node", "127.0.0.1", self.cpus)) for rank in range(2)]

    def poll(self) -> list[RankStatus]:
        self.calls.append("poll")
        done = not self.rounds
        messages = [[], []] if done else self.rounds.pop(0)
        if callable(messages):
            messages = messages()
        if isinstance(messages, Failure):
            raise GroupFailure(messages)
        return [status(rank, own, done=done) for rank, own in enumerate(messages)]

    def stop(self) -> None:
        self.calls.append("stop")

    def end(self) -> None:
        self.calls.append("end")


class Recorded:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, int, dict[str, float]]] = []
        self.all_tags: list[dict[str, str]] = []

    def metrics(
        self, step: int, values: dict[str, float], layer: int | None = None, time_s: float | None = None
    ) -> None:
        self.rows.append((layer, step, values))

    def tags(self, values: dict[str, str]) -> None:
        self.all_tags.append(values)


class Shown:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.progressed: list[Progress] = []

    def progress(self, latest: Progress) -> None:
        self.progressed.append(latest)

    def note(self, note: Note) -> None:
        self.notes.append(str(note))


def status(
    rank: int,
    messages: list[Message],
    *,
    done: bool = False,
    failure: Failure | None = None,
    progress: Progress | None = None,
    stopped: bool = False,
) -> RankStatus:
    return RankStatus(rank, done, failure, [progress] if progress else [], messages, {"": 0}, stopped=stopped)


def metrics_of(
    layer: int, update: int, objective: float = 0.5, exchanged: float = 1000.0, images: int = 100
) -> LayerMetrics:
    """`exchanged` counts from the start of the group, `images` from that of the run."""
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(LayerMetrics)), 0.0)
    values |= {"objective": objective, "bytes_exchanged": exchanged, "num_exchanges": exchanged / 100}
    return LayerMetrics(**values | {"layer": layer, "update": update, "images": images})


def shard_written(run_dir: Path, rank: int, step: int, layer: int = 0, world_size: int = 2) -> ShardWritten:
    """What a rank reports after it wrote its file; the file is there, as the manifest's reader expects."""
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank}-of-{world_size}.safetensors"
    file.write_bytes(b"rows")
    shard = Shard(
        rank=rank,
        file=file.name,
        sha256=sha256(b"rows").hexdigest(),
        rows={"w": [5 * rank, 5 * rank + 5]},
        shapes={"w": [5]},
    )
    cursor = Cursor(step=step, layer=layer, updates=step, images=20 * step)
    return ShardWritten(cursor, shard, {0: LayerState(usual=2.0)})


def both_shards(run_dir: Path, step: int) -> list[list[Message]]:
    """A round in which both ranks report their part of a checkpoint."""
    return [[shard_written(run_dir, rank, step)] for rank in range(2)]


class Scene:
    """A controller of two ranks whose groups play the given scripts, one after another."""

    def __init__(self, config: RunConfig, run_dir: Path, *scripts: Any, **options: Any) -> None:
        self.config, self.run_dir = config, run_dir
        self.recorder, self.display = Recorded(), Shown()
        self.groups: list[ScriptedGroup] = []
        self._scripts = list(scripts)
        self.controller = Controller(config, run_dir, self._make, self.recorder, self.display, **options)

    def _make(self, assignment: Assignment) -> ScriptedGroup:
        script = self._scripts.pop(0)
        start = script if isinstance(script, BaseException) else None
        self.groups.append(ScriptedGroup(assignment, [] if start else script, start))
        return self.groups[-1]

    def round(self, *messages: list[Message]) -> tuple[bool, Failure | None]:
        """One step of the controller in which rank 0, rank 1, … send these messages."""
        group = ScriptedGroup(Assignment(self.config, self.run_dir, 0), [list(messages)])
        return self.controller.step(group)


MakeScene = Callable[..., Scene]


@pytest.fixture
def scene(digits_config: Callable[..., RunConfig], tmp_path: Path) -> MakeScene:
    def make(
        *scripts: Any,
        max_restarts: int = 2,
        min_shards: int | None = None,
        keep: int = 100,
        divergence: str = "stop",
        **options: Any,
    ) -> Scene:
        cluster = {"poll_s": 1e-3, "max_restarts": max_restarts, "min_shards": min_shards, "backoff_s": 1e-3}
        checkpoint = {"every_steps": 4, "keep": keep}
        config = digits_config(2, cluster=cluster, checkpoint=checkpoint, divergence=divergence)
        return Scene(config, tmp_path, *scripts, **options)

    return make


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_disk_that_cannot_be_read_after_a_failure_is_tried_again(
    scene: MakeScene, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def read(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
        calls.append(run_dir)
        if len(calls) <= failures:
            raise OSError(errno.EIO, "Input/output error")
        return newest_good(run_dir, warn)

    monkeypatch.setattr(cluster.controller, "newest_good", read)
    monkeypatch.setattr(simmatch.remote, "FIRST_PAUSE_S", 0.01)
    playing = scene([LOST], [])
    config = playing.controller.config
    checkpoint = config.checkpoint.model_copy(update={"patience_s": 0.2})
    playing.controller.config = config.model_copy(update={"checkpoint": checkpoint})
    if failures == 2:
        assert playing.controller.run().restarts == 1
        assert len(calls) == 3
    else:
        with pytest.raises(RunFailed, match=r"^checkpoints cannot be read: .*Input/output error; run the same command"):
            playing.controller.run()
        assert len(calls) > 2


# -- messages ----------------------------------------------------------------------------------------------------------


def test_metrics_of_rank_zero_are_recorded_once(scene: MakeScene) -> None:
    """All ranks hold the same metrics; each rank sends its own, and one record of each is wanted."""
    rounds = [
        [[metrics_of(0, 5, 0.9)], [metrics_of(0, 5, 0.9)]],
        [[], [metrics_of(0, 10, 0.8)]],
        [[metrics_of(0, 10, 0.8), metrics_of(1, 5, 0.7)], []],
    ]
    playing = scene(rounds)
    record = playing.controller.run()
    assert [(layer, step, values["objective"]) for layer, step, values in playing.recorder.rows] == [
        (0, 5, 0.9),
        (0, 10, 0.8),
        (1, 5, 0.7),
    ]
    assert {layer: [step for step, _ in curve] for layer, curve in record.curves.items()} == {0: [5, 10], 1: [5]}
    assert record.curves[0][-1][1]["objective"] == 0.8
    assert playing.groups[0].calls == ["start", "poll", "poll", "poll", "poll", "end"]


def test_the_result_is_recorded(scene: MakeScene) -> None:
    scored = ReadoutScored("ridge", 100, accuracy=0.9, accuracy_decode=0.8)
    record = scene([[[scored], []]]).controller.run()
    assert record.readout == scored


def test_an_unknown_message_is_an_error(scene: MakeScene) -> None:
    for rank in range(2):
        messages: list[list[Any]] = [[], []]
        messages[rank] = [{"kind": "metrics"}]
        with pytest.raises(AssertionError, match="'kind': 'metrics'"):
            scene().round(*messages)


def test_progress_and_tracebacks_are_shown(scene: MakeScene) -> None:
    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    group.poll = lambda: [  # type: ignore[method-assign]
        status(0, [], progress=Progress("learn", 3, 8)),
        status(1, [Traceback("Traceback: where")]),
    ]
    assert playing.controller.step(group) == (False, None)
    assert playing.display.progressed == [Progress("learn", 3, 8)]
    assert playing.display.notes == ["rank 1:\nTraceback: where"]


def test_phases_that_end_between_two_polls_are_shown(scene: MakeScene) -> None:
    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    outbox, shown = Outbox(), playing.display.progressed
    group.poll = lambda: [RankStatus(0, False, None, list(outbox.phases), [], {"": 0})]  # type: ignore[method-assign]
    steps: list[tuple[Phase, int, int]]
    steps = [("learn", 2, 0), ("learn", 8, 0), ("encode", 4, 0), ("learn", 1, 1), ("learn", 3, 1)]
    for phase, done, layer in steps:
        outbox.progress(Progress(phase, done, 8, layer=layer))
        if (phase, done) in (("learn", 2), ("learn", 3)):
            playing.controller.step(group)
    playing.controller.step(group)
    assert [(latest.layer, latest.phase, latest.done) for latest in shown] == [
        (0, "learn", 2),
        (0, "learn", 8),
        (0, "encode", 4),
        (1, "learn", 3),
        (1, "learn", 3),
    ]


def test_done_means_all_ranks(scene: MakeScene) -> None:
    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    for flags in [(False, False), (True, False), (False, True), (True, True)]:
        group.poll = lambda flags=flags: [  # type: ignore[method-assign, misc]
            status(rank, [], done=done) for rank, done in enumerate(flags)
        ]
        assert playing.controller.step(group) == (all(flags), None)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_committed_when_the_last_shard_is_there(scene: MakeScene, tmp_path: Path) -> None:
    playing = scene()
    folder = folder_of(tmp_path, 4)
    playing.round([], [shard_written(tmp_path, 1, 4)])
    assert not (folder / MANIFEST).exists()
    playing.round([shard_written(tmp_path, 0, 8)], [])  # of another step: does not complete this one
    assert newest_good(tmp_path, pytest.fail) is None
    playing.round([shard_written(tmp_path, 0, 4)], [])
    assert newest_good(tmp_path, pytest.fail) == folder
    manifest = read_manifest(folder)
    assert [shard.rank for shard in manifest.shards] == [0, 1]
    assert manifest.cursor == Cursor(step=4, layer=0, updates=4, images=80)
    assert manifest.layers == [LayerState(usual=2.0)]
    assert RunConfig.model_validate_json(json.dumps(manifest.config)) == playing.config
    playing.round([], [shard_written(tmp_path, 1, 8)])
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 8)
    assert playing.controller.record.steps == 8


def test_old_checkpoints_are_pruned_at_each_commit(scene: MakeScene, tmp_path: Path) -> None:
    playing = scene(keep=2)
    for step in (4, 8, 12, 16):
        playing.round(*both_shards(tmp_path, step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000012", "step-00000016"]


def test_shards_of_a_lost_group_do_not_complete_a_checkpoint_of_the_next(scene: MakeScene, tmp_path: Path) -> None:
    """Rank 0 of the first group wrote its part of step 8 and rank 1 did not; in the second group only rank 1 has so
    far. The two halves belong to different attempts."""
    first = [
        both_shards(tmp_path, 4),
        [[shard_written(tmp_path, 0, 8)], []],
        LOST,
    ]
    second = [[[], [shard_written(tmp_path, 1, 8)]], FAULT]
    playing = scene(first, second)
    with pytest.raises(RunFailed):
        playing.controller.run()
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 4)


def test_a_checkpoint_that_a_rank_could_not_write_is_left_out(scene: MakeScene, tmp_path: Path) -> None:
    playing = scene()
    lost = ShardFailed(4, "[Errno 28] No space left on device")
    playing.round([shard_written(tmp_path, 0, 4)], [lost])
    assert playing.display.notes == [
        "rank 1: the checkpoint of step 4 was not written: [Errno 28] No space left on device"
    ]
    playing.round(*both_shards(tmp_path, 8))
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 8)
    assert not (folder_of(tmp_path, 4) / MANIFEST).exists()


def test_a_disk_without_room_for_the_manifest_does_not_end_the_run(
    scene: MakeScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    playing = scene()

    def full(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / MANIFEST))

    with monkeypatch.context() as patched:
        patched.setattr("cluster.checkpoints.committer.commit", full)
        playing.round(*both_shards(tmp_path, 4))
    (note,) = playing.display.notes
    assert "checkpoint of step 4 was not written" in note
    assert "No space left on device" in note
    playing.round(*both_shards(tmp_path, 8))
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 8)


def model_exported(run_dir: Path, token: str, content: bytes = b"weights") -> ModelExported:
    """What rank 0 reports once it has written the model."""
    for name in ("model.safetensors", "config.yaml"):
        write_whole(run_dir / f"model-{token}" / name, content)
    return ModelExported(f"model-{token}")


def test_only_the_group_in_force_publishes_its_model(scene: MakeScene, tmp_path: Path) -> None:
    """Rank 0 of a group that was given up is cut off, not dead: it writes on, beside the next one and after it."""

    def late() -> Failure:
        model_exported(tmp_path, "0123abcd", b"of the old group")
        return LOST

    playing = scene([late], [[[model_exported(tmp_path, "0123abce")], []]])
    playing.controller.run()
    model_exported(tmp_path, "0123abcd", b"of the old group")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "model" / "config.yaml").read_bytes() == b"weights"
    assert playing.controller.finished


def test_a_run_whose_model_cannot_be_published_has_not_finished(scene: MakeScene, tmp_path: Path) -> None:
    playing = scene([[[ModelExported("model-elsewhere")], []]])
    with pytest.raises(RunFailed, match=r"the model is not published: .*model-elsewhere.*; run the same command again"):
        playing.controller.run()
    assert not playing.controller.finished  # what cuts off the wait for it decides by that


# -- asked to stop -----------------------------------------------------------------------------------------------


class AskedGroup(ScriptedGroup):
    """Trains for ever, in the given phase; once asked to stop, writes a last checkpoint and stops, if it responds."""

    def __init__(self, assignment: Assignment, phase: Phase, responds: bool = True) -> None:
        super().__init__(assignment, [])
        self.phase, self.responds = phase, responds
        self.controller: Controller | None = None

    def poll(self) -> list[RankStatus]:
        self.calls.append("poll")
        if self.calls.count("poll") == 3:
            assert self.controller is not None
            assert self.controller.stop()
        stopped = self.responds and "stop" in self.calls
        messages: list[list[Message]] = both_shards(self.assignment.run_dir, 5) if stopped else [[], []]
        progress = Progress(self.phase, 0, 1)
        return [status(rank, messages[rank], done=stopped, stopped=stopped, progress=progress) for rank in range(2)]


def asked(scene: MakeScene, phase: Phase, responds: bool = True, grace_s: float = 20.0) -> tuple[Scene, AskedGroup]:
    playing = scene()
    cluster = playing.config.cluster.model_copy(update={"grace_s": grace_s})
    playing.controller.config = playing.config.model_copy(update={"cluster": cluster})
    group = AskedGroup(Assignment(playing.config, playing.run_dir, 0), phase, responds)
    group.controller = playing.controller
    playing.controller.make_group = lambda _: group
    return playing, group


def test_a_run_that_is_asked_to_end_waits_for_a_last_checkpoint(scene: MakeScene, tmp_path: Path) -> None:
    playing, group = asked(scene, "learn")
    assert not playing.controller.stop()  # nothing trains yet: nothing to wait for
    with pytest.raises(RunStopped, match="the newest checkpoint is of step 5"):
        playing.controller.run()
    assert group.calls == ["start", "poll", "poll", "poll", "stop", "poll", "end"]
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 5)
    assert not playing.controller.stop()


def test_it_does_not_wait_for_ranks_that_only_encode(scene: MakeScene) -> None:
    playing, group = asked(scene, "encode")
    with pytest.raises(RunStopped, match="no checkpoint was written"):
        playing.controller.run()
    assert group.calls == ["start", "poll", "poll", "poll", "end"]


class EndedLayer(AskedGroup):
    """Encodes after a layer has ended when it is asked; the outcome for the layer's shards comes three rounds later."""

    def __init__(self, assignment: Assignment, fate: str) -> None:
        super().__init__(assignment, "encode")
        self.fate = fate

    def poll(self) -> list[RankStatus]:
        statuses = super().poll()
        phases = [Progress("learn", 5, 5, layer=0, step=5), Progress("encode", 0, 1, layer=0)]
        messages: list[list[Message]] = [[], []]
        if self.calls.count("poll") == 6 and self.fate != "hangs":
            messages = both_shards(self.assignment.run_dir, 5)
            if self.fate == "lost":
                messages[1] = [ShardFailed(5, "full")]
        return [replace(s, done=False, stopped=False, phases=phases, messages=messages[s.rank]) for s in statuses]


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("written", "^the newest checkpoint is of step 5$"),
        ("lost", "^no checkpoint was written$"),
        ("hangs", "^no last checkpoint within 0.2 s$"),
    ],
)
def test_the_shards_of_a_layer_that_has_just_ended_are_waited_for(
    scene: MakeScene, tmp_path: Path, fate: str, message: str
) -> None:
    playing, _ = asked(scene, "encode", grace_s=0.2 if fate == "hangs" else 20.0)
    group = EndedLayer(Assignment(playing.config, playing.run_dir, 0), fate)
    group.controller = playing.controller
    playing.controller.make_group = lambda _: group
    with pytest.raises(RunStopped, match=message):
        playing.controller.run()
    assert group.calls[-1] == "end"
    if fate != "hangs":
        assert group.calls.count("poll") == 6
    expected = folder_of(tmp_path, 5) if fate == "written" else None
    assert newest_good(tmp_path, lambda _: None) == expected


def test_a_layer_that_was_saved_before_this_start_is_not_waited_for(scene: MakeScene, tmp_path: Path) -> None:
    scene([both_shards(tmp_path, 5)]).controller.run()
    playing = scene([[[], []]], resume=folder_of(tmp_path, 5))
    group = AskedGroup(Assignment(playing.config, playing.run_dir, 0), "encode")
    group.controller = playing.controller
    playing.controller.make_group = lambda _: group
    with pytest.raises(RunStopped, match="the newest checkpoint is step-00000005"):
        playing.controller.run()
    assert group.calls == ["start", "poll", "poll", "poll", "end"]


def test_it_waits_no_longer_than_the_grace_period(scene: MakeScene) -> None:
    playing, group = asked(scene, "learn", responds=False, grace_s=0.05)
    with pytest.raises(RunStopped, match=r"no last checkpoint within 0.05 s"):
        playing.controller.run()
    assert group.calls.count("stop") == 1
    assert group.calls[-1] == "end"


# -- what is settled once ----------------------------------------------------------------------------------------


def test_threads_are_counted_once_and_kept(scene: MakeScene, tmp_path: Path) -> None:
    """8 CPUs for two ranks at the start; the next group is placed on a host that allows 2."""
    saved = [both_shards(tmp_path, step) for step in (4, 8)]
    playing = scene([saved[0], LOST], [saved[1]])
    configs: list[RunConfig] = []
    playing.controller.on_config = configs.append
    make = playing.controller.make_group

    def elsewhere(assignment: Assignment) -> Any:
        group = make(assignment)
        assert isinstance(group, ScriptedGroup)
        group.cpus = 8 if assignment.generation == 0 else 2
        return group

    playing.controller.make_group = elsewhere
    playing.controller.run()
    assert [config.cluster.threads_per_rank for config in configs] == [4]
    assert [group.assignment.config.cluster.threads_per_rank for group in playing.groups] == [None, 4]
    assert [read_manifest(folder_of(tmp_path, step)).config["cluster"]["threads_per_rank"] for step in (4, 8)] == [4, 4]
    (note,) = [note for note in playing.display.notes if "threads_per_rank" in note]
    assert (
        note
        == "node (127.0.0.1): 2 CPUs for 2 ranks, fewer than cluster.threads_per_rank=4 for each: slower, same bits; "
        "cluster.threads_per_rank=1 for a new run"
    )


def test_every_group_gets_the_digest_of_the_data(scene: MakeScene, tmp_path: Path) -> None:
    playing = scene([both_shards(tmp_path, 4), LOST], [], data="0123456789abcdef")
    playing.controller.run()
    assert [group.assignment.data for group in playing.groups] == ["0123456789abcdef"] * 2
    assert read_manifest(folder_of(tmp_path, 4)).data == "0123456789abcdef"


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_the_policy_restarts_after_a_loss_only_and_so_often() -> None:
    policy = FailurePolicy(max_restarts=2)
    assert [type(policy.decide(LOST, failed, 2)) for failed in range(4)] == [
        Restart,
        Restart,
        Stop,
        Stop,
    ]
    assert policy.decide(FAULT, 0, 2) == Stop(FAULT.message)
    assert isinstance(FailurePolicy(max_restarts=0).decide(LOST, 0, 2), Stop)


def test_pauses_between_failed_restarts_grow() -> None:
    policy = FailurePolicy(max_restarts=100, backoff_s=2.0)
    pauses = [decision.after_s for n in range(9) if isinstance(decision := policy.decide(LOST, n, 2), Restart)]
    assert pauses == [0, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


@pytest.mark.parametrize(
    ("fits", "min_shards", "expected"),
    [
        (2, 1, Restart(2, 0.0)),
        (1, 1, Restart(1, 0.0)),
        (4, 2, Restart(3, 0.0)),  # room again: as many as before
        (1, None, Restart(3, 0.0)),  # never shrinks: waits for the node
        (1, 2, Stop("no room; cluster.min_shards=2")),
        (0, 1, Stop("no room; cluster.min_shards=1")),
    ],
)
def test_a_group_shrinks_to_what_fits_and_no_further(
    fits: int, min_shards: int | None, expected: Restart | Stop
) -> None:
    policy = FailurePolicy(max_restarts=2, min_shards=min_shards)
    assert policy.decide(Failure("no room", retryable=True, fits=fits), 0, 3) == expected


def test_a_lost_rank_costs_a_new_group_from_the_newest_checkpoint(scene: MakeScene, tmp_path: Path) -> None:
    both = [both_shards(tmp_path, step) for step in (4, 8)]
    playing = scene([*both, LOST], [LOST], [[[metrics_of(0, 10)], []]])
    record = playing.controller.run()
    assert record.restarts == 2
    assert [group.assignment.generation for group in playing.groups] == [0, 1, 2]
    assert [group.assignment.resume for group in playing.groups] == [
        None,
        folder_of(tmp_path, 8),
        folder_of(tmp_path, 8),
    ]
    assert all(group.calls[0] == "start" and group.calls[-1] == "end" for group in playing.groups)
    assert all(group.calls.count("end") == 1 for group in playing.groups)
    assert playing.recorder.all_tags == [{"restarts": "1"}, {"restarts": "2"}]
    assert any("rank 1 (pid 7 on node) was lost" in note and "step-00000008" in note for note in playing.display.notes)


def test_updates_that_are_done_again_are_counted(scene: MakeScene, tmp_path: Path) -> None:
    """The ranks had reported update 13 when one was lost; the newest checkpoint is of update 8, the first one."""

    def at(step: int) -> Any:
        return [status(rank, [], progress=Progress("learn", step, 20, step=step)) for rank in range(2)]

    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    group.poll = lambda: at(3)  # type: ignore[method-assign]
    playing.controller.step(group)
    playing.controller._restart(Restart(2, 0.0), LOST)
    assert "starting a new group from the beginning, 3 updates to repeat" in playing.display.notes[-1]
    playing.round(*both_shards(tmp_path, 8))
    group.poll = lambda: at(13)  # type: ignore[method-assign]
    playing.controller.step(group)
    playing.controller._restart(Restart(2, 0.0), LOST)
    assert "starting a new group from step-00000008, 5 updates to repeat" in playing.display.notes[-1]
    record = playing.controller.record
    assert record.steps_again == 8
    assert summarise(playing.config, record, status="FAILED", seconds=1.0, run_id=None)["steps_again"] == 8


def test_a_restart_skips_a_damaged_checkpoint(scene: MakeScene, tmp_path: Path) -> None:
    both = [both_shards(tmp_path, step) for step in (4, 8)]

    def damaged() -> Failure:
        (folder_of(tmp_path, 8) / "rank-1-of-2.safetensors").write_bytes(b"rowz")
        return LOST

    playing = scene([*both, damaged], [])
    playing.controller.run()
    assert [group.assignment.resume for group in playing.groups] == [None, folder_of(tmp_path, 4)]
    (note,) = [note for note in playing.display.notes if "damaged" in note]
    assert "step-00000008 is damaged and passed over" in note
    assert "rank-1-of-2.safetensors" in note


def test_without_a_checkpoint_a_restart_begins_again(scene: MakeScene) -> None:
    playing = scene([LOST], [])
    playing.controller.run()
    assert [group.assignment.resume for group in playing.groups] == [None, None]
    assert any("from the beginning" in note for note in playing.display.notes)


def test_a_restart_before_the_first_own_checkpoint_continues_from_the_given_one(
    scene: MakeScene, tmp_path: Path
) -> None:
    """The run continues from another run's checkpoint and loses a rank before it has written one of its own."""
    given = folder_of(tmp_path / "another-run", 8)
    playing = scene([LOST], [], resume=given)
    playing.controller.run()
    assert [group.assignment.resume for group in playing.groups] == [given, given]


def test_restarts_end_at_their_limit(scene: MakeScene) -> None:
    playing = scene([LOST], [LOST], [LOST], max_restarts=1)
    with pytest.raises(RunFailed, match=r"^rank 1 \(pid 7 on node\) was lost; cluster.max_restarts=1 without a new"):
        playing.controller.run()
    assert len(playing.groups) == 2
    assert playing.controller.record.restarts == 1


def test_progress_earns_new_restarts(scene: MakeScene, tmp_path: Path) -> None:
    """Four losses, each after a new checkpoint, under a limit of one: a long run on machines that die."""
    scripts = [[both_shards(tmp_path, step), LOST] for step in (4, 8, 12, 16)]
    playing = scene(*scripts, [], max_restarts=1)
    assert playing.controller.run().restarts == 4
    assert playing.groups[-1].assignment.resume == folder_of(tmp_path, 16)


DIVERGED = Failure("rank 0: layer 0, step 3: non-finite activities on rank 1", retryable=False, diverged=True)


def test_the_policy_lowers_rates_once_and_only_if_configured() -> None:
    assert FailurePolicy(max_restarts=2).decide(DIVERGED, 0, 2) == Stop(DIVERGED.message)
    policy = FailurePolicy(max_restarts=2, divergence="lower_rate")
    assert policy.decide(DIVERGED, 0, 2) == Restart(2, 0.0, lower_rate=True)
    assert policy.decide(DIVERGED, 0, 2, lowered=True) == Stop(DIVERGED.message)
    assert policy.decide(FAULT, 0, 2) == Stop(FAULT.message)


def rates(group: ScriptedGroup) -> list[float]:
    return [layer.plasticity.lr for layer in group.assignment.config.model.layers]


def test_numbers_that_diverge_cost_half_the_rate(scene: MakeScene, tmp_path: Path) -> None:
    """Back to the newest checkpoint, on at half the rates, which later groups, and later processes, keep."""
    saved = [both_shards(tmp_path, step) for step in (4, 8)]
    playing = scene([saved[0], DIVERGED], [saved[1], LOST], [DIVERGED], divergence="lower_rate")
    with pytest.raises(RunFailed, match=r"non-finite activities on rank 1$"):
        playing.controller.run()
    assert [rates(group) for group in playing.groups] == [[0.1, 0.1], [0.05, 0.05], [0.05, 0.05]]
    assert playing.groups[1].assignment.resume == folder_of(tmp_path, 4)
    assert playing.recorder.all_tags[0].items() >= {"restarts": "1", "simmatch.rate": "0.5"}.items()
    expected = "starting a new group at 0.5 times the learning rates from step-00000004"
    assert any(expected in note for note in playing.display.notes)
    assert [read_manifest(folder_of(tmp_path, step)).rate for step in (4, 8)] == [1.0, 0.5]
    again = scene([], resume=folder_of(tmp_path, 8))
    again.controller.run()
    assert rates(again.groups[0]) == [0.05, 0.05]
    assert (
        json.loads((folder_of(tmp_path, 8) / MANIFEST).read_text())["config"]["model"]["layers"][0]["plasticity"]["lr"]
        == 0.1
    )


def test_a_lowered_rate_outlives_a_process_that_ends_before_the_next_checkpoint(
    scene: MakeScene, tmp_path: Path
) -> None:
    """The newest checkpoint is from before the divergence; the run's spool holds the rate, which is lowered once."""
    playing = scene([both_shards(tmp_path, 4), DIVERGED], KeyboardInterrupt(), divergence="lower_rate")
    with pytest.raises(KeyboardInterrupt):
        playing.controller.run()
    spool = Spool(tmp_path / SPOOL_NAME).open()
    spool.append(TagsEvent(time_ms=1, values=playing.recorder.all_tags[0]))
    spool.close()
    again = scene([DIVERGED], resume=folder_of(tmp_path, 4), divergence="lower_rate")
    again.controller.record.continue_from(tmp_path / SPOOL_NAME)
    with pytest.raises(RunFailed, match=r"non-finite activities on rank 1$"):
        again.controller.run()
    assert rates(again.groups[0]) == [0.05, 0.05]


@pytest.mark.parametrize("value", ["0", "0.0", "1", "2", "-0.5", "nan", "inf", "0.5x", ""])
def test_a_rate_that_the_spool_should_not_hold_is_ignored(tmp_path: Path, value: str) -> None:
    spool = Spool(tmp_path / SPOOL_NAME).open()
    spool.append(TagsEvent(time_ms=1, values={"simmatch.rate": value}))
    spool.close()
    record = RunRecord()
    record.continue_from(tmp_path / SPOOL_NAME)
    assert record.rate == 1.0


def test_what_a_diverged_branch_recorded_is_dropped(scene: MakeScene, tmp_path: Path) -> None:
    """Update 8 is in a checkpoint; 10 and 15 are recorded, given up and recorded anew. A tag says so in MLflow."""
    saved = both_shards(tmp_path, 8)
    given_up = [(10, 0.8, 200), (15, 99.0, 300)]
    anew = [(10, 0.7, 200), (15, 0.6, 300)]

    def rounds(rows: list[tuple[int, float, int]]) -> list[Round]:
        return [[[metrics_of(0, step, objective, images=images)], []] for step, objective, images in rows]

    first = [*rounds([(5, 0.9, 100)]), saved, *rounds(given_up), DIVERGED]
    playing = scene(first, rounds(anew), divergence="lower_rate")
    record = playing.controller.run()
    expected = [(5, 0.9), (10, 0.7), (15, 0.6)]
    assert [(step, values["objective"]) for step, values in record.curves[0]] == expected
    assert record.curves[0][-1][1]["objective"] == 0.6
    assert record.images == 300
    assert [row[1] for row in playing.recorder.rows] == [5, 10, 15, 10, 15]  # MLflow forgets nothing: newest counts
    tag = playing.recorder.all_tags[0]["simmatch.given_up"]
    assert re.fullmatch(r"records before \d{4}-\S+ of layer 0 after step 8, at higher rates", tag)
    rows = [(0, step, values["objective"]) for _, step, values in playing.recorder.rows]
    for count, known in ((3, 1), (5, 3)):  # what a later process takes over: killed soon after, and at the end
        run_dir = tmp_path / f"{count} rows"
        spool_of(run_dir, *rows[:3], tag, *rows[3:count])
        later = RunRecord()
        later.continue_from(run_dir / SPOOL_NAME)
        assert [(step, values["objective"]) for step, values in later.curves[0]] == expected[:known]
    failing = scene(first, [DIVERGED], divergence="lower_rate")
    with pytest.raises(RunFailed):
        failing.controller.run()
    record = failing.controller.record
    assert [(step, values["objective"]) for step, values in record.curves[0]] == expected[:1]
    assert (record.curves[0][-1][1]["objective"], record.images) == (0.9, 160)
    record.forget({0: 0})
    assert record.curves == {}


def test_what_stages_exchange_is_added_and_their_waits_are_kept_apart() -> None:
    """Each counts from the start of its group; images are those that any of them has heard of."""
    record = RunRecord()
    record.start_group(0)
    record.add(replace(metrics_of(0, 5, exchanged=1000.0, images=100), window_s=2.0, waiting_share=0.25), stage=0)
    record.add(replace(metrics_of(1, 5, exchanged=400.0, images=80), window_s=2.0, waiting_share=0.5), stage=1)
    record.add(replace(metrics_of(0, 10, exchanged=2000.0, images=200), window_s=6.0, waiting_share=0.0), stage=0)
    assert (record.bytes_exchanged, record.num_exchanges, record.images) == (2400.0, 24.0, 200)
    assert record.waits == {0: (8.0, 0.5), 1: (2.0, 1.0)}
    record.start_group(0)
    record.add(metrics_of(1, 10, exchanged=100.0), stage=1)
    assert record.bytes_exchanged == 2500.0


def test_the_records_of_layers_that_learn_together_are_given_up_from_one_update_of_the_pass() -> None:
    layers = [LayerConfig(out_channels=8, kernel_size=1, train=TrainConfig(start_after=start)) for start in (0, 3, 20)]
    model = ModelConfig(layers=tuple(layers), schedule="together")
    updates = updates_at(Cursor(step=12, layer=0, updates=12), model)
    assert updates == {0: 12, 1: 9, 2: 0}
    frozen = model.model_copy(update={"freeze_below": True})
    assert updates_at(Cursor(step=12, layer=0, updates=12), frozen) == {0: 3, 1: 9, 2: 0}
    marks = {int(layer): int(number) for layer, number in ABANDONED.findall(abandoned(updates))}
    assert marks == updates
    record = RunRecord()
    for layer, update in ((0, 10), (0, 15), (1, 5), (1, 10), (2, 1)):
        record.add(metrics_of(layer, update))
    record.forget(marks)
    assert {layer: [update for update, _ in curve] for layer, curve in record.curves.items()} == {0: [10], 1: [5]}


def test_where_a_node_does_not_come_back_the_run_goes_on_with_fewer_shards(scene: MakeScene, tmp_path: Path) -> None:
    before = [both_shards(tmp_path, 4), LOST]
    no_place = GroupFailure(Failure("no room for 2 ranks", retryable=True, fits=1))
    after = [[[shard_written(tmp_path, 0, 8, world_size=1)]]]
    playing = scene(before, no_place, after, min_shards=1)
    playing.controller.run()
    assert [group.assignment.config.mesh.channel for group in playing.groups] == [2, 2, 1]
    assert playing.groups[-1].assignment.resume == folder_of(tmp_path, 4)
    assert playing.controller.config.mesh.channel == 1
    assert len(read_manifest(folder_of(tmp_path, 8)).shards) == 1
    assert playing.recorder.all_tags[-1] == {
        "restarts": "2",
        "simmatch.world_size": "1",
        "simmatch.mesh": "data 1 × layer 1 × channel 1",
    }
    assert any("starting a new group of 1 rank from step-00000004" in note for note in playing.display.notes)


def test_a_group_that_does_not_start_is_replaced(scene: MakeScene) -> None:
    playing = scene(GroupFailure(Failure("rank 1 did not start within 5 s", retryable=True)), [])
    playing.controller.run()
    assert [group.calls for group in playing.groups] == [["start", "end"], ["start", "poll", "end"]]


def test_an_impossible_group_ends_the_run(scene: MakeScene) -> None:
    playing = scene(ConfigError("mesh: expected a larger cluster"), [])
    with pytest.raises(ConfigError, match="larger cluster"):
        playing.controller.run()
    assert [group.calls for group in playing.groups] == [["start", "end"]]


def test_a_fault_of_the_program_stops_the_run(scene: MakeScene) -> None:
    playing = scene([FAULT], [])
    with pytest.raises(RunFailed, match=r"layer 0, step 3: non-finite activities on rank 1$"):
        playing.controller.run()
    assert [group.calls for group in playing.groups] == [["start", "poll", "end"]]


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_fault_explains_the_loss_of_its_peers(scene: MakeScene, faulty: int) -> None:
    """Rank `faulty` raised, and the other one lost its peer through that: a new group would fail again."""
    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    failures = [FAULT if rank == faulty else LOST for rank in range(2)]
    group.poll = lambda: [  # type: ignore[method-assign]
        status(rank, [], done=True, failure=failure) for rank, failure in enumerate(failures)
    ]
    assert playing.controller.step(group) == (False, FAULT)


def test_the_last_messages_of_a_failing_rank_are_handled(scene: MakeScene, tmp_path: Path) -> None:
    """Messages that came with the failure count: the checkpoint they complete is the one to continue from."""
    playing = scene()
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    group.poll = lambda: [  # type: ignore[method-assign]
        status(0, [shard_written(tmp_path, 0, 4)], done=True, failure=LOST),
        status(1, [shard_written(tmp_path, 1, 4)]),
    ]
    assert playing.controller.step(group) == (False, LOST)
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 4)


def test_an_interrupt_ends_the_group(scene: MakeScene) -> None:
    playing = scene(KeyboardInterrupt())  # the script's start raises it
    with pytest.raises(KeyboardInterrupt):
        playing.controller.run()
    assert playing.groups[0].calls == ["start", "end"]


def test_warnings_are_shown(scene: MakeScene) -> None:
    warning = TrainingWarning("layer 0, step 5: the relative objective is above 1")
    playing = scene([[[warning], []]])
    playing.controller.run()
    assert playing.display.notes.count("warning: layer 0, step 5: the relative objective is above 1") == 1


def test_a_warning_about_a_node_is_shown_once_whichever_rank_sends_it(scene: MakeScene) -> None:
    warning = NodeWarning("cache on node-2: shards are read past the cache: No space left on device")
    other = NodeWarning("cache on node-3: shards are read past the cache: No space left on device")
    playing = scene([[[], [warning]], [[other], [warning]]])
    playing.controller.run()
    shown = [note for note in playing.display.notes if note.startswith("warning: ")]
    assert shown == [f"warning: {warning.text}", f"warning: {other.text}"]


def test_metrics_are_not_recorded_twice_after_a_restart(scene: MakeScene, tmp_path: Path) -> None:
    """The second group repeats updates 5 to 10 from the checkpoint at 4, and goes on to 15."""
    first = [
        both_shards(tmp_path, 4),
        [[metrics_of(0, 5, 0.9), metrics_of(0, 10, 0.8)], []],
        LOST,
    ]
    second = [[[metrics_of(0, 5, 0.9), metrics_of(0, 10, 0.8)], []], [[metrics_of(0, 15, 0.7)], []]]
    playing = scene(first, second)
    record = playing.controller.run()
    assert [(layer, step) for layer, step, _ in playing.recorder.rows] == [(0, 5), (0, 10), (0, 15)]
    assert [step for step, _ in record.curves[0]] == [5, 10, 15]
    assert record.curves[0][-1][1]["objective"] == 0.7


def test_bytes_of_all_groups_are_counted(scene: MakeScene) -> None:
    """A group's counters start at 0, and what the lost one has moved was moved."""
    first = [[[metrics_of(0, 5, exchanged=1000.0), metrics_of(0, 10, exchanged=2000.0)], []], LOST]
    second = [[[metrics_of(0, 5, exchanged=1000.0)], []], [[metrics_of(0, 15, exchanged=3000.0)], []]]
    record = scene(first, second).controller.run()
    assert record.bytes_exchanged == 2000.0 + 3000.0
    assert record.num_exchanges == 20.0 + 30.0


def test_throughput_counts_what_this_job_did(scene: MakeScene, tmp_path: Path) -> None:
    """An earlier job trained layer 0 (10 updates of 20 images); this one continues and trains layer 1 (12 of 20)."""
    spool_of(tmp_path, (0, 5, 0.9), (0, 10, 0.8))
    given = folder_of(tmp_path, 10)
    scene().round(*both_shards(tmp_path, 10))
    playing = scene([[[metrics_of(1, 5, images=300), metrics_of(1, 12, images=440)], []]], resume=given)
    playing.controller.record.continue_from(tmp_path / SPOOL_NAME)  # as jobs.pretrain does
    record = playing.controller.run()
    summary = summarise(playing.config, record, status="FINISHED", seconds=10.0, run_id=None)
    assert summary["images_per_second"] == 12 * 20 / 10.0


def test_images_of_updates_that_are_done_again_count_once(scene: MakeScene, tmp_path: Path) -> None:
    """A rank is lost after 10 updates of 20 images; the next group begins at 8 of them and does 12."""
    saved = both_shards(tmp_path, 8)
    first = [[[metrics_of(0, 5, images=100)], []], saved, [[metrics_of(0, 10, images=200)], []], LOST]
    second = [[[metrics_of(0, 10, images=200)], []], [[metrics_of(0, 12, images=240)], []]]
    assert scene(first, second).controller.run().images == 12 * 20


# -- records -----------------------------------------------------------------------------------------------------------


def spool_of(run_dir: Path, *rows: tuple[int | None, int, float] | str) -> None:
    """Rows (layer, step, objective), or a tag; the bytes exchanged grow by 1000 from row to row."""
    run_dir.mkdir(parents=True, exist_ok=True)
    spool = Spool(run_dir / SPOOL_NAME).open()
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            spool.append(TagsEvent(time_ms=50, values={"simmatch.given_up": row}))
            continue
        layer, step, objective = row
        values = {"objective": objective, "bytes_exchanged": 1000.0 * number, "num_exchanges": 10.0 * number}
        spool.append(MetricsEvent(time_ms=number, layer=layer, step=step, values=values))
    spool.append(ParamsEvent(time_ms=99, values={}))
    spool.append(MetricsEvent(time_ms=99, step=22, values={"accuracy": 0.9}))
    spool.close()


def test_a_continued_run_takes_over_what_was_recorded(scene: MakeScene, tmp_path: Path) -> None:
    """From the spool: curves, the last record of each layer, and the exchanges, on which it counts on."""
    spool_of(tmp_path, (0, 5, 0.9), (0, 10, 0.8), (0, 5, 0.9), (1, 5, 0.7))
    given = folder_of(tmp_path, 12)
    playing = scene([[[metrics_of(1, 5, 0.7), metrics_of(1, 10, 0.6, exchanged=500.0)], []]], resume=given)
    playing.controller.record.continue_from(tmp_path / SPOOL_NAME)
    record = playing.controller.run()
    objectives = {layer: [(step, row["objective"]) for step, row in curve] for layer, curve in record.curves.items()}
    assert objectives == {0: [(5, 0.9), (10, 0.8)], 1: [(5, 0.7), (10, 0.6)]}
    assert (record.curves[0][-1][1]["objective"], record.curves[1][-1][1]["objective"]) == (0.8, 0.6)
    assert [(layer, step) for layer, step, _ in playing.recorder.rows] == [(1, 10)]
    assert record.bytes_exchanged == 4000.0 + 500.0
    assert record.num_exchanges == 40.0 + 5.0


def record_of_a_run() -> RunRecord:
    """10 updates of layer 0 and 12 of layer 1, as digits_config has them."""
    layers = {
        index: {
            "objective": 0.5,
            "residual": 0.009,
            "num_iters": 12.0,
            "active_fraction": 0.3,
            "dead_channels": 0.0,
        }
        for index in range(2)
    }
    return RunRecord(
        curves={0: [(5, layers[0]), (10, layers[0])], 1: [(5, layers[1]), (12, layers[1])]},
        readout=ReadoutScored("ridge", 100, accuracy=0.9, accuracy_decode=0.8),
        steps=22,
        restarts=1,
        images=440,
        bytes_exchanged=12345.0,
        num_exchanges=67.0,
    )


def test_the_summary_holds_its_documented_fields(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    summary = summarise(digits_config(2), record_of_a_run(), status="FINISHED", seconds=11.0, run_id="run-1")
    layer = {"objective": 0.5, "residual": 0.009, "num_iters": 12.0, "active_fraction": 0.3, "dead_channels": 0.0}
    expected = {
        "status": "FINISHED",
        "accuracy": 0.9,
        "accuracy_decode": 0.8,
        "world_size": 2,
        "mesh": {"channel": 2, "data": 1, "layer": 1},
        "steps": 22,
        "images_per_second": 440 / 11.0,
        "seconds": 11.0,
        "bytes_exchanged": 12345,
        "num_exchanges": 67,
        "restarts": 1,
        "mlflow_run_id": "run-1",
        "layers": [layer, layer],
    }
    assert expected.items() <= summary.items()
    assert "message" not in summary
    write_whole(tmp_path / "summary.json", dump_json(summary))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_summary_names_the_readout_as_probe(digits_config: Callable[..., RunConfig]) -> None:
    """The contract: `accuracy` is that of the best readout, named in `probe`."""
    summary = summarise(digits_config(2), record_of_a_run(), status="FINISHED", seconds=11.0, run_id="run-1")
    assert summary["probe"] == "ridge"


def test_the_summary_of_a_run_that_failed_early(digits_config: Callable[..., RunConfig]) -> None:
    summary = summarise(digits_config(2), RunRecord(), status="FAILED", seconds=0.0, run_id=None, message="rank 1 died")
    assert (summary["status"], summary["message"], summary["accuracy"], summary["steps"]) == (
        "FAILED",
        "rank 1 died",
        None,
        0,
    )
    assert (summary["layers"], summary["images_per_second"], summary["mlflow_run_id"]) == ([{}, {}], 0.0, None)


def test_a_manifest_survives_its_file(tmp_path: Path, scene: MakeScene) -> None:
    """What `restart` reads is what `commit` wrote, configuration included."""
    playing = scene()
    playing.round(*both_shards(tmp_path, 4))
    content = json.loads((folder_of(tmp_path, 4) / MANIFEST).read_text())
    del content["sha256"]
    assert Manifest.model_validate(content) == read_manifest(folder_of(tmp_path, 4))


def test_ranks_without_progress_are_lost(scene: MakeScene, tmp_path: Path) -> None:
    """Their processes answer and no exchange ends the wait; messages from before count."""
    playing = scene()
    limit_s = playing.config.cluster.stall_timeout_s
    group = ScriptedGroup(Assignment(playing.config, playing.run_dir, 0), [])
    moved = [replace(status(rank, own), idle_s=limit_s - 1) for rank, own in enumerate(both_shards(tmp_path, 4))]
    group.poll = lambda: moved  # type: ignore[method-assign]
    assert playing.controller.step(group) == (False, None)
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 4)
    group.poll = lambda: [replace(one, messages=[], idle_s=limit_s + 1) for one in moved]  # type: ignore[method-assign]
    done, failure = playing.controller.step(group)
    assert not done
    assert failure is not None
    assert failure.retryable
    assert failure.message.startswith(f"ranks 0, 1: no progress for {limit_s:g} s")
