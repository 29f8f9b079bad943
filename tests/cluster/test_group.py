"""Actors of an embedded Ray: a run to its end, and every way to lose a rank, each named and cleaned up after."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

import cluster.group
import cluster.read_out
from cluster.allocation import Allocation
from cluster.checkpoints.reader import newest_good
from cluster.config import RunConfig
from cluster.controller import Controller, RunFailed
from cluster.failures import group_failure, stalled
from cluster.group import WorkerGroup, lease_s
from cluster.layout import RankInfo
from cluster.messages import GroupStarted, Note, Progress, RankStatus
from cluster.placement import Placement, Seat
from cluster.policy import Failure, GroupFailure
from cluster.profiles import FOLDER
from cluster.training import Assignment, Training
from cluster.worker import Worker
from simmatch.config import ConfigError
from simmatch.data.sources import load_dataset
from simmatch.layer import SimilarityMatchingConv2d
from tests.cluster.actors import assert_gone, embedded_ray, limits, nothing_reserved
from tests.faults import FaultPlan, Kind, faulty_worker

pytestmark = pytest.mark.slow

CPUS = 4
LIMIT_S = 60.0

ConfigMaker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """An embedded Ray of this module's own."""
    with embedded_ray(CPUS, num_gpus=1) as ray:  # as Ray was told; whether there is a card is another matter
        yield ray


@pytest.fixture(autouse=True)
def nothing_is_left(ray: Any) -> Iterator[None]:
    """After every test: no placement group, no reserved CPU. Ray gives them back with some delay."""
    yield
    nothing_reserved(ray, CPUS)


@contextmanager
def started(config: RunConfig, run_dir: Path, worker: type[Worker] = Worker) -> Iterator[WorkerGroup]:
    """A group that trains; ended in any case, and its processes with it. `end` may come early, and twice."""
    group = WorkerGroup(Assignment(config, run_dir, 0), worker)
    group.end()
    try:
        group.start()
        yield group
    finally:
        group.end()
        group.end()
        assert_gone([rank.pid for rank in group.ranks])


def poll_until(group: WorkerGroup, reached: Callable[[list[RankStatus]], bool]) -> list[RankStatus]:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        statuses = group.poll()
        if reached(statuses):
            return statuses
        time.sleep(0.05)
    pytest.fail(f"not reached within {LIMIT_S:g} s: {statuses}")


def learning(statuses: list[RankStatus]) -> bool:
    """All ranks have exchanged something: training is under way."""
    return all(sum(status.exchanges.values()) > 20 for status in statuses)


class Quiet:
    """Recorder and display of a run, which keep what the tests look at."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, int]] = []
        self.notes: list[str] = []
        self.began = float("inf")
        """When the newest group began to train: how long actors take to start is the machine's affair."""

    def metrics(self, step: int, values: Any, layer: int | None = None, time_s: float | None = None) -> None:
        if layer is not None:  # not samples of the nodes, which come as time passes
            self.rows.append((layer, step))

    def tags(self, values: dict[str, str]) -> None: ...

    def progress(self, latest: Progress) -> None: ...

    def note(self, note: Note) -> None:
        self.notes.append(str(note))
        if isinstance(note, GroupStarted):
            self.began = time.monotonic()


# -- to the end --------------------------------------------------------------------------------------------------------


def test_a_run_of_two_actors_gives_the_model_of_two_processes(
    ray: Any, digits_config: ConfigMaker, without_ray: bytes, tmp_path: Path
) -> None:
    """Ray carries control only, so not one bit depends on it."""
    quiet = Quiet()
    config = digits_config(2, cluster=limits())
    record = Controller(config, tmp_path, WorkerGroup, quiet, quiet).run()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == without_ray
    assert quiet.rows == [(0, 5), (0, 10), (1, 5), (1, 10), (1, 12)]
    assert record.steps == 22
    assert record.restarts == 0
    assert 0.4 < record.readout.accuracy <= 1.0
    committed = sorted(path.parent.name for path in (tmp_path / "checkpoints").glob("step-*/manifest.json"))
    assert committed == [f"step-{step:08d}" for step in (4, 8, 10, 12, 16, 20, 22)]


@pytest.mark.parametrize("kind", ["kill", "card"])
def test_a_run_survives_a_lost_process_or_card_bit_by_bit(
    ray: Any, digits_config: ConfigMaker, without_ray: bytes, tmp_path: Path, kind: Kind
) -> None:
    """Rank 1 of the first group is lost at update 7 of layer 1; the second group continues from a checkpoint."""
    quiet, config = Quiet(), digits_config(2, cluster=limits())
    worker = faulty_worker(FaultPlan(rank=1, layer=1, step=7, kind=kind))
    record = Controller(config, tmp_path, lambda assignment: WorkerGroup(assignment, worker), quiet, quiet).run()
    assert record.restarts == 1
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == without_ray
    assert quiet.rows == [(0, 5), (0, 10), (1, 5), (1, 10), (1, 12)]
    (note,) = [note for note in quiet.notes if "starting a new group" in note]
    assert note.startswith("rank 1")
    assert ("CUDA error: unspecified launch failure; starting" in note) == (kind == "card")
    assert "from step-" in note  # 16 updates were done, and the controller had seconds to commit those of layer 0


def test_a_killed_actor_leaves_no_half_of_a_trace(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """Rank 1 dies while both record; the next group records other updates of the layer."""
    quiet, config = Quiet(), digits_config(2, cluster=limits())
    worker = faulty_worker(FaultPlan(rank=1, layer=1, step=6, kind="kill"))
    make_group = partial(WorkerGroup, worker_class=worker)
    record = Controller(config, tmp_path, make_group, quiet, quiet, profile=4).run()
    assert record.restarts == 1
    files = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert files == [f"layer-{layer}-rank-{rank}.json.gz" for layer in range(2) for rank in range(2)]
    for layer, of_layer in record.profiles.items():
        for rank, profile in of_layer.items():
            trace = json.loads(gzip.decompress((tmp_path / FOLDER / profile.file).read_bytes()))
            updates = [event for event in trace["traceEvents"] if event.get("name") == "simmatch.update"]
            assert len(updates) == profile.updates > 0, (layer, rank)


# -- ranks that are lost -----------------------------------------------------------------------------------------------

HELD = faulty_worker(FaultPlan(rank=0, layer=0, step=4, kind="hold"))


def test_a_killed_actor_is_named(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    with started(digits_config(2, cluster=limits()), tmp_path, HELD) as group:
        poll_until(group, learning)
        pid = group.ranks[1].pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(GroupFailure) as caught:
            poll_until(group, lambda _: False)
    assert caught.value.failure.retryable
    assert f"rank 1 (pid {pid} on " in caught.value.failure.message
    assert "rank 0" not in caught.value.failure.message
    assert "\n" not in caught.value.failure.message


def test_all_ranks_that_are_lost_are_named(
    digits_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose GPU has failed, and those that nccl has ended for it, in whatever order they are found."""

    def get(ref: int, timeout: float) -> int:
        if ref == 1:
            return ref
        raise ActorDiedError

    monkeypatch.setattr(cluster.group, "ray", SimpleNamespace(wait=lambda refs, **_: (refs[:1], refs[1:]), get=get))
    group = WorkerGroup(Assignment(digits_config(3), tmp_path, 0))
    with pytest.raises(GroupFailure) as caught:
        group._gather([2, 1, 0], "answer", 5.0)
    assert caught.value.failure.retryable
    assert re.fullmatch(r"rank 0 was lost: ActorDiedError: [^;]*; likewise rank 2", caught.value.failure.message)


def test_a_stopped_actor_is_named_within_the_heartbeat(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    heartbeat_s = 2.0
    config = digits_config(2, cluster=limits(heartbeat_s=heartbeat_s))
    with started(config, tmp_path, HELD) as group:
        poll_until(group, learning)
        pid = group.ranks[1].pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(GroupFailure) as caught:
            poll_until(group, lambda _: False)
        waited_s = time.monotonic() - began
    assert caught.value.failure.retryable
    assert caught.value.failure.message.startswith(f"rank 1 (pid {pid} on ")
    assert caught.value.failure.message.endswith("did not answer within 2 s")
    assert heartbeat_s - 0.1 <= waited_s < heartbeat_s + 5.0  # a poll may just have passed; the machine may be busy


def test_a_rank_that_keeps_the_others_waiting_is_a_loss(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """Its process answers, its training thread does not come to the exchange: the peer's limit ends the wait."""
    config = digits_config(2, cluster=limits(collective_timeout_s=3.0))
    with started(config, tmp_path, HELD) as group:
        statuses = poll_until(group, lambda statuses: any(status.failure for status in statuses))
    assert statuses[0].failure is None
    failure = statuses[1].failure
    assert failure is not None
    assert failure.retryable
    assert failure.message.startswith("rank 1 of 2 waited for exchange ")
    assert "(limit 3 s)" in failure.message
    told = group_failure(statuses, 900.0, 3.0)
    assert told is not None
    exchange = sum(statuses[1].exchanges.values())
    missing = f"rank 0 has not started exchange {exchange} (layer 0, learn 3/10), rank 1 waited for it: "
    assert told.message == f"{missing}{failure.message}"


def test_an_exception_of_one_rank_alone_names_it_and_stops_the_run(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """The others do not learn of it and wait; the run ends at the next poll, long before their limit."""
    quiet, config = Quiet(), digits_config(2, cluster=limits(collective_timeout_s=100.0))
    worker = faulty_worker(FaultPlan(rank=1, layer=0, step=3, kind="error"))
    controller = Controller(config, tmp_path, lambda assignment: WorkerGroup(assignment, worker), quiet, quiet)
    with pytest.raises(RunFailed, match="InjectedError: injected") as caught:
        controller.run()
    assert time.monotonic() - quiet.began < 50.0
    assert controller.record.restarts == 0
    assert any("Traceback" in note and note.startswith("rank 1:") for note in quiet.notes)
    assert "layer 0, step 3" in str(caught.value)
    assert "rank 1" in str(caught.value)


def test_a_rank_without_enough_memory_ends_the_run_with_advice(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """The others learn of it at the same exchange. It is not tried again, and the checkpoint before it stands."""
    quiet, config = Quiet(), digits_config(2, cluster=limits())
    worker = faulty_worker(FaultPlan(rank=1, layer=1, step=9, kind="memory"))
    controller = Controller(config, tmp_path, lambda assignment: WorkerGroup(assignment, worker), quiet, quiet)
    with pytest.raises(RunFailed) as caught:
        controller.run()
    assert str(caught.value) == (
        "rank 1: layer 1, learning: out of GPU memory (asked for 2.1 GiB, 812 MiB of 79.2 GiB free): "
        "set model.layers.1.train.batch_size to at most 10 (now 20), or use more ranks"
    )
    assert controller.record.restarts == 0
    newest = newest_good(tmp_path, pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000016"  # before update 9 of layer 1, the run's 19th


# -- groups that do not come up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "wanted"),
    [
        ({"cluster": limits(cpus_per_rank=3)}, "CPU", "6"),
        pytest.param(
            {"device": "cuda"},
            "GPU",
            "2",
            marks=pytest.mark.skipif(torch.cuda.device_count() > 1, reason="has the devices that it asks for"),
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_with_the_sizes(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path, changes: dict[str, Any], kind: str, wanted: str
) -> None:
    group = WorkerGroup(Assignment(digits_config(2, **changes), tmp_path, 0), grows=False)
    with pytest.raises(ConfigError, match=rf"at least {wanted} {kind} for 2 ranks, got one with \d+$"):
        group.start()
    group.end()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_node_whose_torch_has_no_gpu_is_refused(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """Ray counts a GPU there. Known to the rank alone, and before anything is trained."""
    group = WorkerGroup(Assignment(digits_config(1, device="cuda", cluster=limits()), tmp_path, 0))
    with pytest.raises(ConfigError) as caught:
        group.start()
    group.end()
    assert str(caught.value).startswith(
        f"device: rank 0 on {socket.gethostname()}: expected one that torch can use here, got 'cuda': "
    )
    assert_gone([rank.pid for rank in group.ranks])


def test_parts_of_a_gpu_on_many_nodes_are_no_gpu(digits_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeManagerAddress": "10.0.0.7", "Resources": {"CPU": 8.0, "GPU": 0.5}}
    nodes = [node, node | {"NodeManagerAddress": "10.0.0.8"}]
    placement = Placement(digits_config(1, device="cuda"), grows=False)
    answers = {"report its resources": {"CPU": 16.0, "GPU": 1.0}, "list its nodes": nodes}
    monkeypatch.setattr(placement, "_ask", lambda verb, call, limit_s=0.0: answers[verb])
    with pytest.raises(ConfigError) as caught:
        placement.request()
    assert str(caught.value) == (
        "mesh: expected nodes with room for 1 rank of 1 CPU and 1 GPU, got nodes: 10.0.0.7 with 8 CPU and "
        "0.5 GPU, 10.0.0.8 with 8 CPU and 0.5 GPU; 1 rank more than there is room for"
    )


def test_a_busy_cluster_is_waited_for_and_then_named(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    blocker = ray.util.placement_group([{"CPU": 3.0}])
    assert blocker.wait(20)
    group = WorkerGroup(Assignment(digits_config(2, cluster=limits(placement_timeout_s=1.0)), tmp_path, 0))
    expected = r"no room for 2 ranks of 1 CPU within 1 s; free now: 1 CPU; nodes: .*; cluster\.placement_timeout_s=1$"
    try:
        with pytest.raises(GroupFailure, match=expected) as caught:
            group.start()
    finally:
        group.end()
        ray.util.remove_placement_group(blocker)
    assert not caught.value.failure.retryable  # a new request would be one more among those that wait


def test_a_group_that_may_shrink_does_so_while_others_have_the_rest(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    blocker = ray.util.placement_group([{"CPU": 3.0}])
    assert blocker.wait(20)
    waits = limits(min_shards=1, start_timeout_s=1.0)
    group = WorkerGroup(Assignment(digits_config(2, cluster=waits), tmp_path, 0))
    try:
        with pytest.raises(GroupFailure, match=r"no room for 2 ranks ") as caught:
            group.start()
    finally:
        group.end()
        ray.util.remove_placement_group(blocker)
    assert (caught.value.failure.retryable, caught.value.failure.fits) == (True, 1)


class Elsewhere(Worker):
    """Rank 1 runs on a node whose folder of the run directory's name is its own."""

    def __init__(self, assignment: Assignment) -> None:
        assert isinstance(assignment.run_dir, Path)
        if assignment.rank == 1:
            assignment = replace(assignment, run_dir=assignment.run_dir / "own")
        super().__init__(assignment)


def test_a_run_directory_that_is_not_shared_is_refused(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """Named with rank and node before anything is trained; checkpoints would be committed without its shards."""
    (tmp_path / "own").mkdir()
    quiet, config = Quiet(), digits_config(2, cluster=limits())
    controller = Controller(config, tmp_path, lambda assignment: WorkerGroup(assignment, Elsewhere), quiet, quiet)
    with pytest.raises(ConfigError) as caught:
        controller.run()
    assert str(caught.value) == (
        f"--run-dir: expected a folder that all nodes share, got {tmp_path}: "
        f"rank 1 on {socket.gethostname()}: does not see the file that this job wrote there"
    )
    assert (quiet.rows, quiet.notes) == ([], [])
    assert [path.name for path in tmp_path.rglob("*")] == ["own"]


class DiesOnJoin(Worker):
    """Rank 1 dies when the ranks meet."""

    def join(self, interface: str | None, address: str, store: tuple[str, int]) -> None:
        if self.assignment.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().join(interface, address, store)


def test_a_rank_that_dies_while_the_others_wait_for_it_is_the_one_named(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    config = digits_config(2, cluster=limits(collective_timeout_s=3.0))
    with pytest.raises(GroupFailure) as caught, started(config, tmp_path, DiesOnJoin):
        pass
    assert caught.value.failure.retryable
    assert "rank 1 (pid " in caught.value.failure.message


class StopsOnBind(Worker):
    """Rank 0, which is to hold the store, stops before it says where."""

    def bind(self, interface: str | None, address: str) -> tuple[str, int]:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().bind(interface, address)


class StopsOnJoin(Worker):
    """Rank 0 has bound the store, and is stopped while the ranks join."""

    def join(self, interface: str | None, address: str, store: tuple[str, int]) -> None:
        if self.assignment.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        super().join(interface, address, store)


@pytest.mark.fault
@pytest.mark.parametrize(("worker", "verb"), [(StopsOnBind, "bind its store"), (StopsOnJoin, "join the group")])
def test_a_stopped_holder_of_the_store_is_named_within_the_limit(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path, worker: type[Worker], verb: str
) -> None:
    """What waits for its store in C++, without a limit of its own, does not make the controller wait."""
    limit_s = 20.0  # for actors to start, too
    config = digits_config(2, cluster=limits(start_timeout_s=limit_s, collective_timeout_s=3.0, heartbeat_s=2.0))
    began = time.monotonic()
    with pytest.raises(GroupFailure) as caught, started(config, tmp_path, worker):
        pass
    assert time.monotonic() - began < 5 * limit_s
    failure = caught.value.failure
    assert failure.retryable
    assert failure.message.startswith("rank 0 (pid ")
    assert f"did not {verb} within" in failure.message


class FailsOnJoin(Worker):
    """Rank 1 gets an interface that it does not have; rank 0 waits for it."""

    def join(self, interface: str | None, address: str, store: tuple[str, int]) -> None:
        super().join("eth77" if self.assignment.rank == 1 else interface, address, store)


def test_a_rank_that_cannot_meet_the_others_is_not_waited_for(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    config = digits_config(2, cluster=limits(start_timeout_s=100.0, collective_timeout_s=90.0, heartbeat_s=1.0))
    began = time.monotonic()
    with pytest.raises(GroupFailure) as caught, started(config, tmp_path, FailsOnJoin):
        pass
    assert time.monotonic() - began < 50.0
    assert not caught.value.failure.retryable
    message = caught.value.failure.message
    assert message.startswith("rank 1 (pid ")
    assert "could not join the group: ValueError: cluster.interface: expected the interface eth77" in message


class FailsToBegin(Worker):
    """Its constructor raises, as where a node lacks a package."""

    def __init__(self, assignment: Assignment) -> None:
        raise ModuleNotFoundError("No module named 'simmatch'")


def test_an_actor_that_cannot_be_made_is_a_fault_that_names_its_reason(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    with (
        pytest.raises(GroupFailure) as caught,
        started(digits_config(2, cluster=limits()), tmp_path, FailsToBegin),
    ):
        pass
    assert not caught.value.failure.retryable
    expected = (  # of whichever Ray reports first
        r"rank [01] failed: ModuleNotFoundError: No module named 'simmatch'; every node needs the job's upload "
        rf"\(ray job submit --working-dir\) or the checkout at the driver's path, here {re.escape(os.getcwd())}"
    )
    assert re.fullmatch(expected, caught.value.failure.message)


def test_ranks_of_a_node_take_the_order_of_their_gpus(
    digits_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has given GPU 2 to the first actor, 0 to the second, 1 to the third; each becomes another rank in place."""
    group = WorkerGroup(Assignment(digits_config(3), tmp_path, 0))
    workers = [Worker(Assignment(digits_config(3), tmp_path, rank)) for rank in range(3)]
    by_actor = [SimpleNamespace(renumber=SimpleNamespace(remote=worker.renumber)) for worker in workers]
    group._actors = list(by_actor)
    group._seats = [Seat(0, "a", "10.0.0.1")] * 3
    group.ranks = [
        RankInfo(rank, 70 + rank, Allocation("a", "10.0.0.1", 8, gpus=(gpu,))) for rank, gpu in enumerate("201")
    ]
    monkeypatch.setattr(group, "_gather", lambda refs, verb: refs)
    group._order_by_gpu()
    assert [(rank.rank, rank.pid, rank.allocation.gpus) for rank in group.ranks] == [
        (0, 71, ("0",)),
        (1, 72, ("1",)),
        (2, 70, ("2",)),
    ]
    assert group._actors == [by_actor[1], by_actor[2], by_actor[0]]
    assert [worker.assignment.rank for worker in workers] == [2, 0, 1]
    assert [worker.poll(0).rank for worker in workers] == [2, 0, 1]


# -- ranks that do not move --------------------------------------------------------------------------------------------


def test_a_lone_rank_that_is_stuck_is_noticed(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """No other rank waits for it in an exchange, and its process answers: only its idle time shows it."""
    limit_s = 2.0
    config = digits_config(1, cluster=limits())
    with started(config, tmp_path, HELD) as group:
        third = Progress("learn", 3, 10, layer=0, step=3)  # the next update is held
        poll_until(group, lambda statuses: statuses[0].progress == third)
        began = time.monotonic()
        statuses = poll_until(group, lambda statuses: stalled(statuses, limit_s) is not None)
        waited_s = time.monotonic() - began
    failure = stalled(statuses, limit_s)
    assert failure is not None
    assert failure.retryable
    assert failure.message == "rank 0: no progress for 2 s (layer 0, learn 3/10, exchange 0)"
    assert limit_s <= statuses[0].idle_s < limit_s + 5.0
    assert waited_s < 30.0


def test_a_stuck_rank_is_told_from_those_that_wait_for_it(ray: Any, digits_config: ConfigMaker, tmp_path: Path) -> None:
    """Rank 0 is held; rank 1 stands still in the exchange that it has started."""
    with started(digits_config(2, cluster=limits()), tmp_path, HELD) as group:
        poll_until(group, learning)
        statuses = poll_until(group, lambda statuses: all(status.idle_s > 1.0 for status in statuses))
    failure = stalled(statuses, 1.0)
    assert failure is not None
    expected = r"rank 0 has not started exchange \d+ \(layer 0, learn \d+/10\), rank 1 waited for it for 1 s"
    assert re.fullmatch(expected, failure.message), failure.message
    assert stalled(statuses, 100.0) is None


FIFTH = "exchange 5 (layer 1, learn 3/10)"


def still(rank: int, idle_s: float, num_exchanges: int, *, done: bool = False) -> RankStatus:
    progress = Progress("learn", 3, 10, layer=1)
    return RankStatus(rank, done, None, [progress], [], {"": num_exchanges}, idle_s=idle_s)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([still(0, 1.0, 5), still(1, 1.0, 5)], None),
        ([still(0, 9.0, 5), still(1, 1.0, 5)], "rank 0: no progress for 8 s (layer 1, learn 3/10, exchange 5)"),
        ([still(0, 9.0, 5), still(1, 9.0, 5)], "ranks 0, 1: no progress for 8 s (layer 1, learn 3/10, exchange 5)"),
        ([still(0, 9.0, 5, done=True), still(1, 1.0, 5)], None),
        ([still(0, 3.5, 5), still(1, 0.0, 5)], None),
        ([still(0, 2.5, 5), still(1, 3.5, 4)], None),
        ([still(0, 3.5, 5), still(1, 0.0, 4)], f"rank 1 has not started {FIFTH}, rank 0 waited for it for 3 s"),
        ([still(0, 9.0, 5), still(1, 9.0, 4)], f"rank 1 has not started {FIFTH}, rank 0 waited for it for 3 s"),
        (
            [still(0, 3.5, 5), still(1, 1.0, 4), still(2, 9.0, 6), still(3, 4.0, 4)],
            f"ranks 1, 3 have not started {FIFTH}, ranks 0, 2 waited for it for 3 s",
        ),
        ([still(0, 9.0, 5, done=True), still(1, 1.0, 4)], None),
    ],
)
def test_who_holds_up_the_rest(statuses: list[RankStatus], expected: str | None) -> None:
    assert stalled(statuses, 8.0, 3.0) == (None if expected is None else Failure(expected, retryable=True))


class Patient(Training):
    """A rank whose every calibration, and whose fit of the readout, computes for longer than all limits."""

    def run(self) -> None:
        def longer(work: Callable[..., Any]) -> Callable[..., Any]:
            def slow(*arguments: Any) -> Any:
                until = time.monotonic() + 8.0
                while time.monotonic() < until:
                    torch.rand(300, 300) @ torch.rand(300, 300)
                return work(*arguments)

            return slow

        SimilarityMatchingConv2d.set_input = longer(SimilarityMatchingConv2d.set_input)  # type: ignore[method-assign]
        cluster.read_out.ridge_of_moments = longer(cluster.read_out.ridge_of_moments)
        super().run()


@pytest.mark.fault
def test_long_work_of_one_rank_ends_no_run(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path, without_ray: bytes
) -> None:
    """More than twice the limit on an exchange, twice that on standing still, and every poll is answered."""
    waits = limits(heartbeat_s=3.0, collective_timeout_s=3.0, stall_timeout_s=4.0, max_restarts=0)
    worker = type("PatientWorker", (Worker,), {"training_class": Patient})
    quiet = Quiet()
    record = Controller(
        digits_config(2, cluster=waits), tmp_path, lambda each: WorkerGroup(each, worker), quiet, quiet
    ).run()
    assert record.restarts == 0
    assert record.readout.accuracy > 0.5
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == without_ray


class KilledWhileItEncodes(Training):
    """Rank 1 of the first group dies in the middle of encoding with layer 0; all write down how much they encode."""

    blocks = 0

    def encoded(self, index: int, activities: torch.Tensor, passed: torch.Tensor) -> None:
        assignment = self.assignment
        if (index, assignment.rank, assignment.generation, self.blocks) == (0, 1, 0, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        self.blocks += 1
        with Path(str(assignment.run_dir), f"encoded-{index}-{assignment.rank}").open("a") as file:
            file.write(f"{len(passed)}\n")


@pytest.mark.fault
def test_after_a_kill_nothing_is_encoded_twice(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path, without_ray: bytes
) -> None:
    """But for the one block that the other rank was in the middle of. The whole run again encodes nothing at all."""
    config = digits_config(2, cluster=limits(max_restarts=1))
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})})
    worker = type("KilledWorker", (Worker,), {"training_class": KilledWhileItEncodes})

    def encoded(run_dir: Path) -> list[int]:
        files = [run_dir.glob(f"encoded-{index}-*") for index in range(2)]
        return [sum(int(line) for path in each for line in path.read_text().split()) for each in files]

    def run(run_dir: Path, generation: int) -> Quiet:
        quiet = Quiet()
        run_dir.mkdir()
        made = worker if generation == 0 else Worker
        record = Controller(config, run_dir, lambda each: WorkerGroup(each, made), quiet, quiet).run()
        assert record.restarts == 1 - generation
        assert (run_dir / "model" / "model.safetensors").read_bytes() == without_ray
        return quiet

    quiet = run(tmp_path / "killed", 0)
    first, second = encoded(tmp_path / "killed")
    count = len(load_dataset(config.data).train_images)
    assert second == count
    assert count <= first <= count + config.encode_batch
    assert any(
        re.fullmatch(r"layer 0: [0-9]+ of [0-9,]+ encoded images found, not encoded again", n) for n in quiet.notes
    )
    quiet = run(tmp_path / "again", 1)
    assert [
        f"layer {index}: {count:,} encoded images found, not encoded again" in quiet.notes for index in range(2)
    ] == [True] * 2


# -- ranks without a controller ----------------------------------------------------------------------------------------


@pytest.mark.fault
def test_ranks_without_a_controller_end_by_themselves(
    ray: Any, digits_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a partition: the process, its thread in an exchange and its writer are gone once the lease is over."""
    monkeypatch.setattr("cluster.group.LEASE_FACTOR", 0.1)
    config = digits_config(2, cluster=limits())  # 0.1 · the longest of its waits, the 120 s of an exchange
    assert lease_s(config.cluster) == 12.0
    with started(config, tmp_path, HELD) as group:
        began = time.monotonic()
        while time.monotonic() - began < 14.0:  # while they are polled, they live longer than that
            poll_until(group, learning)
            time.sleep(0.5)
        last_poll = time.monotonic()
        assert_gone([rank.pid for rank in group.ranks], limit_s=12.0 + 8.0)
        assert time.monotonic() - last_poll > 12.0 - 2.0
        with pytest.raises(GroupFailure, match="was lost"):
            group.poll()


STUCK = """
import sys
from types import SimpleNamespace
from cluster.worker import Worker
worker = Worker(SimpleNamespace(rank=0))
worker.expire_after(0.5)
print("begun", flush=True)
sum(range(10**12))  # holds the interpreter: no thread of Python's own could end this process
"""


def test_a_stuck_interpreter_ends_as_well() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert "Timeout" in done.stderr
    assert 'File "<string>"' in done.stderr  # where it was stuck
