"""A controller and hundreds of ranks without bodies: what a round costs, in time, bytes and memory.

The ranks are plain workers that do not train; a pretended Ray hands over their answers as pickles.
"""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

import cluster.group
from cluster.checkpoints.manifest import Cursor, LayerState, Shard
from cluster.config import RunConfig
from cluster.controller import Controller
from cluster.group import WorkerGroup
from cluster.mesh import MeshConfig
from cluster.messages import LayerMetrics, Phase, Progress, ShardWritten
from cluster.policy import GroupFailure
from cluster.training import Assignment
from cluster.worker import Worker

PHASES: tuple[Phase, ...] = ("calibrate", "learn", "encode")
ConfigMaker = Callable[..., RunConfig]


class PretendedRay:
    """Answers are there at once; counts the references looked at and the bytes handed over."""

    def __init__(self) -> None:
        self.looked_at = self.bytes = 0
        self.silent: set[int] = set()
        self.dead: set[int] = set()

    def wait(self, refs: Sequence[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.looked_at += len(set(refs))  # as Ray does, to refuse doubles
        answered = [ref for ref in refs if ref[0] not in self.silent][:num_returns]
        return answered, []

    def get(self, ref: tuple[int, bytes], timeout: float) -> Any:
        if ref[0] in self.dead:
            raise ActorDiedError
        self.bytes += len(ref[1])
        return pickle.loads(ref[1])


def actor_of(worker: Worker) -> Any:
    rank = worker.assignment.rank
    return SimpleNamespace(poll=SimpleNamespace(remote=lambda first: (rank, pickle.dumps(worker.poll(first)))))


class Scene:
    """A group of workers in the middle of layer 1, and its controller."""

    def __init__(self, config: RunConfig, ranks: int, run_dir: Path) -> None:
        self.config = config.model_copy(update={"mesh": MeshConfig(channel=ranks)})
        assignment = Assignment(self.config, run_dir, 0)
        self.group = WorkerGroup(assignment)
        self.workers = [Worker(Assignment(self.config, run_dir, rank)) for rank in range(ranks)]
        for worker in self.workers:
            worker._outbox.leads = worker.assignment.rank == 0  # a single stage
        self.group._actors = [actor_of(worker) for worker in self.workers]
        self.group._head = SimpleNamespace(lost=False)  # type: ignore[assignment]
        nothing: Any = SimpleNamespace(
            progress=lambda latest: None, note=lambda note: None, metrics=lambda *given, **named: None
        )
        self.controller = Controller(self.config, run_dir, lambda _: self.group, nothing, nothing)
        self.updates = 0
        for phase in PHASES:
            self.report(Progress(phase, 100, 100, layer=0))

    def report(self, progress: Progress) -> None:
        for worker in self.workers:
            worker._outbox.progress(progress)

    def step(self) -> None:
        """What every rank sends between two polls, and one round."""
        self.updates += 10
        values: dict[str, Any] = dict.fromkeys((field.name for field in fields(LayerMetrics)), 0.5)
        metrics = LayerMetrics(**values | {"layer": 1, "update": self.updates, "images": 100 * self.updates})
        self.report(Progress("learn", self.updates, 1000, layer=1, step=100 + self.updates, metrics=(metrics,)))
        cursor = Cursor(step=100 + self.updates, layer=1, updates=self.updates)
        for worker in self.workers[1:]:  # never complete: nothing is committed
            rank = worker.assignment.rank
            rows = {"layers.1.lateral": [rank, rank + 1]}
            shard = Shard(rank=rank, file=f"rank-{rank}-of-512.safetensors", sha256="0" * 64, rows=rows, shapes={})
            worker._outbox.send(metrics)
            worker._outbox.send(ShardWritten(cursor, shard, dict.fromkeys(range(2), LayerState())))
        self.workers[0]._outbox.send(metrics)
        assert self.controller.step(self.group) == (False, None)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> PretendedRay:
    pretended = PretendedRay()
    monkeypatch.setattr(cluster.group, "ray", pretended)
    return pretended


def cost(config: RunConfig, ranks: int, run_dir: Path, ray: PretendedRay) -> dict[str, float]:
    """Of one round: processor seconds of this thread (the least of five), references looked at, bytes handed over, and
    bytes of memory at the most."""
    scene = Scene(config, ranks, run_dir)
    scene.step()
    seconds = []
    for _ in range(5):
        ray.looked_at = ray.bytes = 0
        started = time.thread_time()
        scene.step()
        seconds.append(time.thread_time() - started)
    tracemalloc.start()
    scene.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": min(seconds), "looked at": ray.looked_at / 2, "bytes": ray.bytes / 2, "memory": peak}


def test_a_round_grows_with_the_ranks_and_not_with_their_square(
    digits_config: ConfigMaker, tmp_path: Path, ray: PretendedRay
) -> None:
    """512 ranks against 128: 4 times as many. A square is 16 times; noisy times are told from it at 8."""
    config = digits_config(2)
    few, many = (cost(config, ranks, tmp_path, ray) for ranks in (128, 512))
    for name in few:
        assert many[name] / few[name] < (8.0 if name == "seconds" else 5.5), (name, few, many)
    assert many["seconds"] < 1.0
    assert many["memory"] < 16e6
    assert many["bytes"] < 512 * 3000


def impatient(digits_config: ConfigMaker, ranks: int, tmp_path: Path) -> Scene:
    """A heartbeat of 0.3 s."""
    config = digits_config(2)
    quick = config.cluster.model_copy(update={"heartbeat_s": 0.3})
    return Scene(config.model_copy(update={"cluster": quick}), ranks, tmp_path)


def test_ranks_that_do_not_answer_are_counted_and_some_are_named(
    digits_config: ConfigMaker, tmp_path: Path, ray: PretendedRay
) -> None:
    scene = impatient(digits_config, 64, tmp_path)
    ray.silent = set(range(10, 60))
    with pytest.raises(GroupFailure, match=r"^rank 10, rank 11, rank 12 and 47 more did not answer within 0.3 s$"):
        scene.step()


def test_a_rank_that_waits_for_a_lost_one_is_late_after_what_has_passed(
    digits_config: ConfigMaker, tmp_path: Path, ray: PretendedRay
) -> None:
    """Not after the limit on the call, which may be long."""
    scene = impatient(digits_config, 2, tmp_path)
    ray.dead, ray.silent = {0}, {1}
    with pytest.raises(
        GroupFailure, match=r"^rank 1 did not encode within 0\.[3-9] s; rank 0 was lost: ActorDiedError"
    ):
        scene.group._gather([(0, b""), (1, b"")], "encode", limit_s=900.0)


def test_a_rank_keeps_no_messages_that_have_arrived(
    digits_config: ConfigMaker, tmp_path: Path, ray: PretendedRay
) -> None:
    scene = Scene(digits_config(2), 2, tmp_path)
    for _ in range(20):
        scene.step()
    assert [len(worker._outbox.messages) for worker in scene.workers] == [1, 1]
    assert [worker._outbox.sent for worker in scene.workers] == scene.group._received == [20, 20]


def test_only_rank_0_sends_what_all_ranks_know(digits_config: ConfigMaker, tmp_path: Path, ray: PretendedRay) -> None:
    scene = Scene(digits_config(2), 3, tmp_path)
    scene.step()
    sent = [{type(message) for message in worker._outbox.messages} for worker in scene.workers]
    assert sent == [{LayerMetrics}, {ShardWritten}, {ShardWritten}]
    statuses = scene.group.poll()
    assert [len(status.phases) for status in statuses] == [len(PHASES) + 1, 1, 1]
    assert [status.progress is not None and len(status.progress.metrics) for status in statuses] == [1, 0, 0]
    assert all(status.progress is not None and status.progress.done == 10 for status in statuses)
