"""A rank whose GPU is stuck, told from those that wait for it: exchanges that are only queued, as under nccl.

Here a device is a thread that does what is queued, in order. Waiting for an exchange returns at once, hosts are several
updates ahead of their devices, and they only stand still where they read what a device has computed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cluster.collectives
from cluster.collectives import DeviceCounter, TorchExchange
from cluster.config import RunConfig
from cluster.failures import group_failure
from cluster.messages import Outbox, RankStatus
from cluster.policy import Failure
from cluster.training import Assignment
from cluster.worker import Worker
from simmatch.sharding.mesh import Mesh
from tests.exchanges import Board

WORLD_SIZE, STUCK, EXCHANGES, STOP_AT = 3, 1, 8, 5
STALL_S, WAIT_S = 60.0, 0.5
EXPECTED = f"rank 1 has not started exchange {STOP_AT} (start), ranks 0, 2 waited for it"
ABORTED = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5) ran for 240000 milliseconds"


class Device:
    """Does what is queued, in order. An aborted one goes on after the work that it was stuck in, as nccl's does."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.aborted = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.queue.get()()

    def synchronize(self) -> None:
        """Wait for all that is queued, or raise once the device was aborted."""
        reached = threading.Event()
        self.queue.put(reached.set)
        while not reached.wait(0.01) and not self.aborted.is_set():
            pass
        if self.aborted.is_set():
            raise dist.DistBackendError(ABORTED)


class QueuedCounter(DeviceCounter):
    """The counter, whose arithmetic is queued on such a device."""

    def __init__(self, device: Device) -> None:
        super().__init__(torch.device("cpu"))
        self.device = device

    def advance(self) -> None:
        self.device.queue.put(super().advance)


class Rank:
    """A worker with its device, whose program starts `EXCHANGES` exchanges and then reads the result.

    Parameters
    ----------
    stuck: where rank `STUCK` stands still before exchange `STOP_AT`: its "device", its "host" or "nowhere".
    replayed: whether exchanges are replayed from a captured graph, so that the host counts the first one only.
    """

    def __init__(self, rank: int, board: Board, assignment: Assignment, stuck: str, *, replayed: bool) -> None:
        self.device, self.board, self.rank = Device(), board, rank
        self.released = threading.Event()
        group: Any = SimpleNamespace(own_rank=rank, device=self.device, board=board, page=0)
        self.exchange = TorchExchange(group, WAIT_S, QueuedCounter(self.device))

        def program(_: Assignment, mesh: Mesh, report: Outbox, device: torch.device) -> Any:
            def run() -> None:
                for number in range(1, EXCHANGES + 1):
                    here = number == STOP_AT and rank == STUCK
                    if here and stuck == "device":
                        self.device.queue.put(self.released.wait)
                    elif here and stuck == "host":
                        self.released.wait()
                    if replayed and number > 1:
                        self.exchange._counter.advance()  # type: ignore[union-attr]
                        gather(torch.zeros(WORLD_SIZE, 2).view(-1), torch.zeros(2), group, async_op=True)
                    else:
                        mesh.everyone.all_gather(torch.zeros(WORLD_SIZE, 2)).wait()
                    report.beat()
                self.device.synchronize()

            return SimpleNamespace(run=run)

        self.worker = Worker(assignment)
        self.worker._mesh = Mesh.of_owners(self.exchange)
        self.worker.training_class = program  # type: ignore[assignment]
        self.worker.begin(1)


def gather(gathered: Tensor, own: Tensor, group: Any, *, async_op: bool) -> Any:
    """What is queued for an exchange: the device stands still in it until those of all ranks have come to it."""
    assert async_op
    page, group.page = group.page, group.page + 1

    def kernel() -> None:
        group.board.post(page, group.own_rank, own.clone())
        while len(group.board.pages[page]) < WORLD_SIZE and not group.device.aborted.is_set():
            time.sleep(0.002)

    group.device.queue.put(kernel)
    return SimpleNamespace(wait=lambda: None)


MakeRanks = Callable[..., list[Rank]]


@pytest.fixture
def make_ranks(
    monkeypatch: pytest.MonkeyPatch, digits_config: Callable[..., RunConfig], tmp_path: Path
) -> Iterator[MakeRanks]:
    monkeypatch.setattr(dist, "get_rank", lambda group: group.own_rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: WORLD_SIZE)
    monkeypatch.setattr(cluster.collectives, "_all_gather", gather)
    made: list[Rank] = []

    def make(stuck: str, *, replayed: bool = False) -> list[Rank]:
        board, config = Board(WORLD_SIZE), digits_config(3)
        made.extend(
            Rank(rank, board, Assignment(config, tmp_path, rank), stuck, replayed=replayed)
            for rank in range(WORLD_SIZE)
        )
        return made

    yield make
    for rank in made:
        rank.released.set()


def verdict(ranks: list[Rank]) -> tuple[Failure, list[RankStatus]]:
    """What the controller's rounds find in the end."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        statuses = [rank.worker.poll(0) for rank in ranks]
        failure = group_failure(statuses, STALL_S, WAIT_S)
        if failure is not None:
            return failure, statuses
        time.sleep(0.05)
    pytest.fail(f"nothing was found: {statuses}")


@pytest.mark.parametrize("replayed", [False, True], ids=["queued", "replayed"])
def test_the_rank_whose_device_is_stuck_is_named(make_ranks: MakeRanks, replayed: bool) -> None:
    """The hosts have started equally many exchanges: only what the devices have come to tells the ranks apart."""
    ranks = make_ranks("device", replayed=replayed)
    failure, statuses = verdict(ranks)
    assert failure == Failure(f"{EXPECTED} for {WAIT_S:g} s", retryable=True)
    assert {rank.exchange.num_exchanges for rank in ranks} == {1 if replayed else EXCHANGES}
    assert [status.exchanges[""] for status in statuses] == [STOP_AT, STOP_AT - 1, STOP_AT]


def test_the_rank_whose_host_is_stuck_is_named(make_ranks: MakeRanks) -> None:
    failure, _ = verdict(make_ranks("host"))
    assert failure == Failure(f"{EXPECTED} for {WAIT_S:g} s", retryable=True)


def test_ranks_that_are_aborted_first_do_not_change_the_verdict(make_ranks: MakeRanks) -> None:
    """Rank 0's error comes from the watchdog, before the controller's limit."""
    ranks = make_ranks("device")
    while ranks[0].worker.poll(0).exchanges[""] < STOP_AT:
        time.sleep(0.01)
    ranks[0].device.aborted.set()
    failure, _ = verdict(ranks)
    assert failure.retryable
    assert failure.message.startswith(f"rank 1 has not started exchange {STOP_AT} (start), rank 0 waited for it: ")
    assert failure.message.endswith(f"rank 0: DistBackendError: {ABORTED}")


def test_ranks_that_move_are_left_alone(make_ranks: MakeRanks) -> None:
    ranks = make_ranks("nowhere")
    deadline = time.monotonic() + 20.0
    while not all((statuses := [rank.worker.poll(0) for rank in ranks])[rank].done for rank in range(WORLD_SIZE)):
        assert time.monotonic() < deadline
        assert group_failure(statuses, STALL_S, WAIT_S) is None
        time.sleep(0.01)
    assert [status.failure for status in statuses] == [None] * WORLD_SIZE
    assert [status.exchanges[""] for status in statuses] == [EXCHANGES] * WORLD_SIZE


@pytest.mark.gpu
def test_a_device_counts_what_it_has_come_to(cuda: torch.device) -> None:
    """Without waiting for it, and in every replay of a captured graph."""
    counter = DeviceCounter(cuda)
    torch.cuda._sleep(int(5e8))
    counter.advance()
    assert counter.value == 0
    torch.cuda.synchronize()
    assert counter.value == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter.advance()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert counter.value == 4
