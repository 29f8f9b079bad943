"""What follows a group that ends, goes or grows: policies by the clock, and the controller against scripted groups."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster.halting
from cluster.allocation import Allocation
from cluster.config import RunConfig
from cluster.controller import Controller, RunFailed, RunStopped
from cluster.departures import ClusterView, departures
from cluster.layout import RankInfo
from cluster.messages import Message, Progress, RankStatus
from cluster.policy import Failure, FailurePolicy, GroupFailure, GrowthPolicy, Restart, Stop
from cluster.training import Assignment
from simmatch.config import ConfigError
from tests.cluster.test_controller import LOST, Recorded, ScriptedGroup, Shown, shard_written, status

HELD = Allocation("w", "10.0.0.7", cpus=8)
TAKEN = Failure("node n with rank 1 is drained by Ray", retryable=True, preempted=True)

# -- policies ----------------------------------------------------------------------------------------------------------


def test_preemptions_have_a_limit_of_their_own_or_none() -> None:
    unlimited = FailurePolicy(max_restarts=0)
    assert all(isinstance(unlimited.decide(TAKEN, in_a_row, 2), Restart) for in_a_row in (0, 1, 1000))
    assert isinstance(unlimited.decide(LOST, 0, 2), Stop)
    limited = FailurePolicy(max_restarts=9, max_preemptions=1)
    assert limited.decide(TAKEN, 0, 2) == Restart(2, 0.0)
    assert limited.decide(TAKEN, 1, 2) == Stop(f"{TAKEN.message}; cluster.max_preemptions=1 without a new checkpoint")


Look = tuple[float, int, bool, int | None]
"""Seconds, room, whether the group has a checkpoint of its own → shards of the larger group."""


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([(0, 1, True, None), (59, 1, True, None), (60, 1, True, 3)], id="room for long enough"),
        pytest.param([(0, 2, True, None), (60, 2, True, 4)], id="all at once"),
        pytest.param([(0, 9, True, None), (60, 9, True, 4)], id="never more than configured"),
        pytest.param([(0, 0, True, None), (900, 0, True, None)], id="no room"),
        pytest.param([(0, 1, True, None), (50, 2, True, None), (60, 2, True, None), (110, 2, True, 4)], id="one more"),
        pytest.param(
            [(second, second // 30 % 2, True, None) for second in range(0, 900, 10)], id="a node that comes and goes"
        ),
        pytest.param([(0, 1, False, None), (70, 1, False, None), (80, 1, True, 3)], id="no checkpoint yet"),
    ],
)
def test_a_group_of_two_grows_when_room_has_stayed(looks: list[Look]) -> None:
    policy = GrowthPolicy(full=4, after_s=60.0)
    for now_s, room, saved, expected in looks:
        assert policy.decide(now_s, 2, room, saved=saved) == expected, now_s


def test_a_larger_group_that_does_not_come_up_is_tried_less_and_less_often() -> None:
    policy, now_s = GrowthPolicy(full=2, after_s=60.0), 0.0
    waits = []
    for _ in range(4):
        began = now_s
        while policy.decide(now_s, 1, 1, saved=True) is None:
            now_s += 1.0
        waits.append(now_s - began)
        assert policy.at_a_restart(now_s, 1, 1) == 2
        policy.tried(now_s, came_up=False)
        assert policy.at_a_restart(now_s + 1.0, 1, 1) is None
    assert waits == [60.0, 120.0, 240.0, 480.0]
    policy.tried(now_s, came_up=True)
    assert policy.at_a_restart(now_s + 1.0, 1, 1) == 2


def test_departures_name_what_goes_with_a_node() -> None:
    ranks = [RankInfo(rank, 7 + rank, HELD, node="ab"[rank]) for rank in range(2)]
    view = ClusterView({"a": None, "c": 9.0, "d": 12.4}, own_node="d")
    found = departures(view, ranks, [0, 1], now_s=10.0)
    assert {name: (departure.what, departure.driver) for name, departure in found.items()} == {
        "a": ("node w (10.0.0.7) with rank 0 is drained by Ray and has no deadline", False),
        "d": ("the node with the driver of this job is drained by Ray and ends in 2 s", True),
        "rank 1": ("rank 1 (pid 8 on w) has got SIGTERM", False),
    }
    both = departures(replace(view, own_node="a"), ranks, [], now_s=10.0)["a"]
    assert both.what == "node w (10.0.0.7) with rank 0 and the driver of this job is drained by Ray and has no deadline"
    assert both.driver


# -- the controller ----------------------------------------------------------------------------------------------------

Rounds = Callable[["LearningGroup"], None]


class LearningGroup(ScriptedGroup):
    """Learns one update a round until its `end`, when it is done; asked to stop, it writes a checkpoint and stops.

    `at` maps a round to what happens before it.
    """

    def __init__(self, assignment: Assignment, at: dict[int, Rounds], first: int, end: int) -> None:
        super().__init__(assignment, [])
        self.at, self.step, self.end_step, self.polls = at, first, end, 0
        self.size = assignment.config.mesh.world_size
        self.terminated = False
        self.phase: Any = "learn"

    def start(self, note: Callable[[str], None]) -> None:
        super().start(note)
        self.ranks = [RankInfo(rank, 6 + rank, HELD, node=f"n{rank}") for rank in range(self.size)]

    def poll(self) -> list[RankStatus]:
        self.polls += 1
        if self.polls in self.at:
            self.at[self.polls](self)
        if self.failure is not None:
            raise self.failure
        stops = "stop" in self.calls
        self.step += 1
        saves = stops or self.polls == 2
        done = stops or self.step >= self.end_step
        progress = Progress(self.phase, self.step, self.end_step, layer=0, step=self.step)

        def messages(rank: int) -> list[Message]:
            run_dir = self.assignment.run_dir
            assert isinstance(run_dir, Path)
            return [shard_written(run_dir, rank, self.step, world_size=self.size)] if saves else []

        statuses = [
            status(rank, messages(rank), done=done, progress=progress, stopped=stops) for rank in range(self.size)
        ]
        return [replace(each, terminated=self.terminated and each.rank == 1) for each in statuses]


class Scene:
    """A run of two ranks whose groups do as each of the scripts says; one that is an exception does not start.

    Groups become larger by a clock of one second a round.
    """

    def __init__(self, make: Callable[..., RunConfig], run_dir: Path, *scripts: Any, **waits: Any) -> None:
        limits = {"poll_s": 1e-3, "max_restarts": 3, "min_shards": 1, "backoff_s": 1e-3, "grow_after_s": 2.5}
        config = make(2, cluster=limits | waits, checkpoint={"every_steps": 4, "keep": 100})
        self.recorder, self.display = Recorded(), Shown()
        self.groups: list[LearningGroup] = []
        self._scripts = list(scripts)
        self.controller = Controller(config, run_dir, self._make, self.recorder, self.display)
        self.controller._succession._clock = lambda: float(sum(group.polls for group in self.groups))

    def _make(self, assignment: Assignment) -> LearningGroup:
        script = self._scripts.pop(0)
        step = 0 if assignment.resume is None else int(assignment.resume.name.removeprefix("step-"))
        fails = isinstance(script, Exception)
        self.groups.append(LearningGroup(assignment, {} if fails else script, step, step + 40))
        self.groups[-1].failure = script if fails else None
        return self.groups[-1]

    def run(self) -> Any:
        return self.controller.run()

    @property
    def sizes(self) -> list[int]:
        return [group.size for group in self.groups]

    def told(self) -> list[str]:
        """Of new groups."""
        return [note for note in self.display.notes if "starting a new group" in note]


def drains(node: str, at_s: float | None = None) -> Rounds:
    def drain(group: LearningGroup) -> None:
        group.view = replace(group.view, draining={node: at_s})

    return drain


def has_room(room: int) -> Rounds:
    def find(group: LearningGroup) -> None:
        group.view = replace(group.view, room=room)

    return find


def loses(group: LearningGroup) -> None:
    group.failure = GroupFailure(LOST)


def wait(_: LearningGroup) -> None:
    time.sleep(5e-3)


NO_ROOM = GroupFailure(Failure("no room for 2 ranks", retryable=True, fits=1))


def test_a_drained_node_is_left_with_a_checkpoint_and_counts_for_itself(
    digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    scene = Scene(digits_config, tmp_path, {5: drains("n1", time.time() + 30.5)}, {}, max_restarts=0)
    record = scene.run()
    assert (record.preemptions, record.restarts, record.steps_again) == (1, 0, 0)
    assert scene.recorder.all_tags == [{"preemptions": "1"}]
    (told,) = scene.told()
    assert told.startswith("node w (10.0.0.7) with rank 1 is drained by Ray and ends in 30 s, stopped ")
    assert told.endswith(" s later; starting a new group from step-00000006")
    assert scene.groups[0].calls.count("stop") == 1
    assert [group.assignment.generation for group in scene.groups] == [0, 1]


def test_nodes_without_ranks_are_left_alone(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    assert Scene(digits_config, tmp_path, {3: drains("elsewhere", 0.0)}).run().preemptions == 0


def test_a_rank_that_is_lost_with_its_drained_node_is_no_failure(
    digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The node goes before the ranks come to an update at which they write."""

    def silent(group: LearningGroup) -> None:
        drains("n1")(group)
        group.stop = lambda: None  # type: ignore[method-assign]

    scene = Scene(digits_config, tmp_path, {5: silent, 8: loses}, {}, max_restarts=0)
    record = scene.run()
    assert (record.preemptions, record.restarts, record.steps_again) == (1, 0, 5)
    (told,) = scene.told()
    assert told == (
        f"node w (10.0.0.7) with rank 1 is drained by Ray and has no deadline; {LOST.message}; "
        "starting a new group from step-00000002, 5 updates to repeat"
    )


def test_a_second_node_that_goes_meanwhile_is_told(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def slow(group: LearningGroup) -> None:
        drains("n1")(group)
        stop, group.stop = group.stop, lambda: None  # type: ignore[method-assign]

        def second(_: LearningGroup) -> None:
            group.view = replace(group.view, draining={"n0": None, "n1": None})

        group.at |= {group.polls + 2: second, group.polls + 4: lambda _: stop()}

    scene = Scene(digits_config, tmp_path, {5: slow}, {})
    assert scene.run().preemptions == 1
    assert "node w (10.0.0.7) with rank 0 is drained by Ray and has no deadline" in scene.display.notes


def test_preemptions_without_a_checkpoint_between_them_end_at_their_limit(
    digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    taken = GroupFailure(TAKEN)
    scene = Scene(digits_config, tmp_path, taken, taken, taken, max_preemptions=1)
    with pytest.raises(RunFailed, match=r"drained by Ray; cluster\.max_preemptions=1 without a new checkpoint$"):
        scene.run()
    assert scene.controller.record.preemptions == 1
    drained: list[Any] = [{5: drains("n1")} for _ in range(4)]
    assert Scene(digits_config, tmp_path / "progress", *drained, {}, max_preemptions=1).run().preemptions == 4


def test_a_group_without_its_drained_node_needs_no_restart(
    digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """No node takes its place, so the group shrinks."""
    scene = Scene(digits_config, tmp_path, {5: drains("n1")}, NO_ROOM, {}, max_restarts=0)
    assert scene.run().preemptions == 1
    assert scene.sizes == [2, 2, 1]


def test_a_process_that_gets_sigterm_is_replaced(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def terminate(group: LearningGroup) -> None:
        group.terminated = True

    scene = Scene(digits_config, tmp_path, {5: terminate}, {}, max_restarts=0)
    assert scene.run().preemptions == 1
    assert scene.told()[0].startswith("rank 1 (pid 7 on w) has got SIGTERM, stopped ")


def test_ranks_that_do_not_learn_are_replaced_at_once(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def encode(group: LearningGroup) -> None:
        group.phase, group.step = "encode", 1
        drains("n1")(group)

    scene = Scene(digits_config, tmp_path, {3: encode}, {})
    assert scene.run().preemptions == 1
    assert "stop" not in scene.groups[0].calls


@pytest.mark.parametrize("left_s", [300.0, pytest.param(-5.0, id="over, by the clock of another machine")])
def test_the_drivers_own_node_ends_the_run(
    digits_config: Callable[..., RunConfig], tmp_path: Path, left_s: float
) -> None:
    def drain(group: LearningGroup) -> None:
        group.view = ClusterView({"head": time.time() + left_s}, own_node="head")

    scene = Scene(digits_config, tmp_path, {5: drain})
    with pytest.raises(RunStopped, match=r"^the newest checkpoint is of step 6$") as caught:
        scene.run()
    assert caught.value.why.startswith("the node with the driver of this job is drained by Ray and ends in ")


def test_it_waits_no_longer_than_the_node_lives(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def drain(group: LearningGroup) -> None:
        group.stop = lambda: None  # type: ignore[method-assign]
        group.view = ClusterView({"head": time.time() + 0.05}, own_node="head")

    scene = Scene(digits_config, tmp_path, {5: drain} | dict.fromkeys(range(6, 40), wait))
    with pytest.raises(RunStopped, match=r"^no last checkpoint within 0\.0\d* s$"):
        scene.run()


def test_a_group_that_shrank_grows_at_a_checkpoint(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """It learns on while there is room for 2.5 s, and stops with nothing lost."""
    small = {1: has_room(1)}
    scene = Scene(digits_config, tmp_path, {5: loses}, NO_ROOM, small, {})
    record = scene.run()
    assert scene.sizes == [2, 2, 1, 2]
    assert [group.missing for group in scene.groups] == [0, None, 1, 0]
    assert (record.growths, record.restarts, record.steps_again) == (1, 2, 2)
    _, shrunk, grown = scene.told()
    assert "starting a new group of 1 rank from step-00000002" in shrunk
    assert grown.startswith("there is room for 2 ranks again, stopped ")
    assert grown.endswith("starting a new group of 2 ranks from step-00000007")
    assert scene.recorder.all_tags[-2:] == [
        {"simmatch.world_size": "2", "simmatch.mesh": "data 1 × layer 1 × channel 2"},
        {"growths": "1"},
    ]


@pytest.mark.parametrize(
    "larger",
    [
        pytest.param(NO_ROOM, id="room that is gone"),
        pytest.param(ConfigError("--run-dir: expected a folder that all nodes share"), id="a node that is no use"),
        pytest.param(GroupFailure(Failure("other data", retryable=False)), id="a node with other data"),
    ],
)
def test_where_the_larger_group_does_not_come_up_the_smaller_one_goes_on(
    digits_config: Callable[..., RunConfig], tmp_path: Path, larger: Exception
) -> None:
    """It costs no update, and no restart; the next attempt has to wait."""
    small = {1: has_room(1)}
    scene = Scene(digits_config, tmp_path, {5: loses}, NO_ROOM, small, larger, small, {}, max_restarts=2)
    record = scene.run()
    assert scene.sizes == [2, 2, 1, 2, 1, 2]
    assert (record.growths, record.restarts, record.steps_again) == (1, 2, 2)
    grown, back, again = (told.split("; ")[-1] for told in scene.told()[2:])
    assert grown == "starting a new group of 2 ranks from step-00000007"
    assert back == "starting a new group of 1 rank from step-00000007"
    assert again == "starting a new group of 2 ranks from step-00000013"


def test_a_restart_uses_room_that_has_come(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    scene = Scene(digits_config, tmp_path, {5: loses}, NO_ROOM, {1: has_room(1), 2: loses}, {}, grow_after_s=900.0)
    record = scene.run()
    assert scene.sizes == [2, 2, 1, 2]
    assert (record.growths, record.restarts) == (1, 3)


def test_room_that_ranks_of_a_drained_node_need_is_no_room_for_more(
    digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A larger group would wait for it in vain."""
    small = {1: has_room(1), 3: drains("n0")}
    scene = Scene(digits_config, tmp_path, {5: loses}, NO_ROOM, small, {}, grow_after_s=900.0)
    record = scene.run()
    assert scene.sizes == [2, 2, 1, 1]
    assert (record.growths, record.preemptions) == (0, 1)


def test_the_end_of_the_run_comes_before_growth(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def ask(_: LearningGroup) -> None:
        assert scene.controller.stop()

    small = {1: has_room(1), 4: ask}
    scene = Scene(digits_config, tmp_path, {5: loses}, NO_ROOM, small)
    with pytest.raises(RunStopped, match=r"^the newest checkpoint is of step \d+$"):
        scene.run()
    assert scene.controller.config.mesh.channel == 1
    assert cluster.halting.Halt("").outranks(cluster.halting.Halt("", TAKEN))
