"""A group of ranks as Ray actors: placed, started, joined, polled, and ended as one.

Training uses `ray.remote` here only. Calls go through Ray, tensors never do. Every wait has a limit, whose message
names the ranks that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.config import GroupConfig
from cluster.departures import ClusterView
from cluster.failures import classify
from cluster.layout import RankInfo, idle_gpus, threads_per_rank
from cluster.messages import RankStatus
from cluster.network import LOOPBACK, RayHead
from cluster.node_usage import samplers
from cluster.placement import Placement, Seat, ask_ray, order_by_gpu
from cluster.policy import Failure, GroupFailure
from cluster.shared_folder import check_copies, write_nonce
from cluster.timeouts import run_with_timeout
from cluster.training import Assignment
from cluster.watch import ClusterWatch
from cluster.worker import Worker
from simmatch.config import ConfigError
from simmatch.documents import listed

Result = TypeVar("Result")

LEASE_FACTOR = 2.0
"""How long a rank outlives its controller, over the longest pause of a healthy controller."""

MOST_NAMED = 3
"""Ranks in one message."""

LOOK_S = 0.1
"""Longest time for which a rank's error is not noticed while others have not answered."""

END_S = 10.0
"""Longest wait for Ray to release actors and resources at the end of a group."""

NO_CODE = ("No module named 'cluster'", "No module named 'simmatch'")
"""End of the error where a node has this project's packages from nowhere."""

CODE_HINT = "every node needs the job's upload (ray job submit --working-dir) or the checkout at the driver's path"


class WorkerGroup:
    """The ranks of one generation.

    Parameters
    ----------
    assignment: of rank 0; every rank gets a copy with its own number.
    worker_class: the class made into actors.
    grows: whether nodes may join the cluster, so that one that is too small is waited for.

    Attributes
    ----------
    ranks: where each rank runs, once they have started.
    """

    def __init__(self, assignment: Assignment, worker_class: type[Worker] = Worker, *, grows: bool = True) -> None:
        self.assignment, self.worker_class = assignment, worker_class
        self.config = assignment.config.cluster
        self.world_size = assignment.config.mesh.world_size
        self.ranks: list[RankInfo] = []
        self._placement = Placement(assignment.config, grows=grows)
        self._seats: list[Seat] = []
        self._actors: list[Any] = []
        self._received = [0] * self.world_size
        self._head: RayHead | None = None
        self._watch: ClusterWatch | None = None

    def start(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Place the actors, join them to one group, and begin training.

        note: told what is waited for.

        Raises
        ------
        ConfigError
            The cluster is too small for the group and cannot grow, or a node cannot use the run directory.
        GroupFailure
            There was no room for the group, or a rank did not start in time.
        """
        self._head = RayHead(ray.get_runtime_context().gcs_address, self.config.heartbeat_s)
        self._check_own_node()
        self._placement.request()
        self._placement.wait(note)
        self._seats = self._placement.seats()
        self._ask("start actors", self._create)
        nonce = self._write_nonce()
        interface = self.config.interface
        calls = [
            actor.describe.remote(interface, seat.address)
            for actor, seat in zip(self._actors, self._seats, strict=True)
        ]
        described: list[RankInfo] = self._gather(calls, "start")
        self.ranks = [replace(rank, node=seat.node) for rank, seat in zip(described, self._seats, strict=True)]
        refuse_ranks("device: ", {rank: rank.device_error.removeprefix("device: ") for rank in self.ranks})
        self._check_run_dir(nonce)
        self._order_by_gpu()
        if self.world_size > 1:
            self._rendezvous()
        if self.assignment.generation == 0:
            self._tell_idle_gpus(note)
        threads = self.config.threads_per_rank or threads_per_rank(self.ranks)
        sampling = samplers(self.ranks) if self.assignment.config.tracking.system_metrics_s else set()
        calls = [actor.begin.remote(threads, samples=rank in sampling) for rank, actor in enumerate(self._actors)]
        self._gather(calls, "begin")

    def _check_own_node(self) -> None:
        """A driver whose own node is gone cannot own actors: Ray ends every one that it makes."""
        own = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == own and not node["Alive"] for node in self._ask("list its nodes", ray.nodes)):
            raise GroupFailure(Failure("the Ray node that this job's driver runs on is gone", retryable=False))

    def _at_run_dir(self, call: Callable[[], Result]) -> Result:
        """The result of a call that uses the run directory; one that hangs or fails now may work later."""
        try:
            return run_with_timeout(self.config.start_timeout_s, str(self.assignment.run_dir), call)
        except OSError as error:  # a TimeoutError is one
            message = f"the run directory cannot be used: {' '.join(str(error).split())}"
            raise GroupFailure(Failure(message, retryable=True)) from error

    def _write_nonce(self) -> str:
        return self._at_run_dir(lambda: write_nonce(self.assignment.run_dir, self.assignment.token))

    def _check_run_dir(self, nonce: str) -> None:
        """Refuse a run directory that is not the same on every node, before anything is trained."""
        run_dir, token = self.assignment.run_dir, self.assignment.token
        errors = [rank.run_dir_error for rank in self.ranks]
        errors = self._at_run_dir(lambda: check_copies(run_dir, token, nonce, errors))
        expected = f"--run-dir: expected a folder that all nodes share, got {run_dir}: "
        refuse_ranks(expected, dict(zip(self.ranks, errors, strict=True)))

    def _create(self) -> None:
        """An actor for every rank."""
        actor_class = ray.remote(self.worker_class)
        for rank, seat in enumerate(self._seats):
            actor = actor_class.options(max_restarts=0, **self._placement.options(seat))
            self._actors.append(actor.remote(replace(self.assignment, rank=rank)))
            self._actors[-1].expire_after.remote(lease_s(self.config))
            self._actors[-1].outlast_sigterm.remote()

    def _order_by_gpu(self) -> None:
        """Neighbours in rank get neighbouring GPUs: which GPU Ray gives to an actor is known to the actor alone."""
        order = order_by_gpu(self._seats, [rank.allocation.gpus for rank in self.ranks])
        if order != sorted(order):
            self._actors = [self._actors[rank] for rank in order]
            self._seats = [self._seats[rank] for rank in order]
            self.ranks = [replace(self.ranks[before], rank=rank) for rank, before in enumerate(order)]
            self._gather([actor.renumber.remote(rank) for rank, actor in enumerate(self._actors)], "take its number")

    def _tell_idle_gpus(self, note: Callable[[str], None]) -> None:
        free = self._ask("report its resources", ray.available_resources)
        idle = idle_gpus(self.assignment.config, int(free.get("GPU", 0)))
        if idle is not None:
            note(idle)

    def _ask(self, verb: str, call: Callable[[], Result]) -> Result:
        return ask_ray(self.config.heartbeat_s, verb, call)

    def _rendezvous(self) -> None:
        """Rank 0 binds a store and all join it, on loopback where they share a machine."""
        nodes = [seat.address for seat in self._seats]
        addresses = [LOOPBACK] * self.world_size if len(set(nodes)) == 1 else nodes
        interface = self.config.interface
        (store,) = self._gather([self._actors[0].bind.remote(interface, addresses[0])], "bind its store")
        self._gather(
            [
                actor.join.remote(interface, address, store)
                for actor, address in zip(self._actors, addresses, strict=True)
            ],
            "join the group",
        )

    def poll(self) -> list[RankStatus]:
        """Status of every rank, each with its new messages.

        Raises
        ------
        GroupFailure
            A rank died, or did not answer within the heartbeat, or the head of Ray's cluster did not.
        """
        refs = [actor.poll.remote(first) for actor, first in zip(self._actors, self._received, strict=True)]
        statuses: list[RankStatus] = self._gather(refs, "answer", limit_s=self.config.heartbeat_s)
        self._check_head()
        self._received = [first + len(status.messages) for first, status in zip(self._received, statuses, strict=True)]
        return statuses

    def watch(self, missing: int) -> None:
        """From now on look at the cluster, and keep room for ranks that are missing; does not wait."""
        self._watch = ClusterWatch(self._placement.needs, missing)

    @property
    def view(self) -> ClusterView:
        """What is known of the cluster, a second old or so."""
        return ClusterView() if self._watch is None else self._watch.latest

    def _check_head(self) -> None:
        """Actors answer without the head, but no lost rank could be replaced, and Ray would end this process."""
        assert self._head is not None
        if self._head.lost:
            where, limit_s = self._head.address, self._head.limit_s
            message = f"the head of the Ray cluster at {where} has not answered for {limit_s:g} s"
            raise GroupFailure(Failure(message, retryable=False))

    def stop(self) -> None:
        """Ask all ranks to stop at a step that they agree on. Does not wait: see `RankStatus.stopped`."""
        for actor in self._actors:
            actor.stop.remote()

    def _gather(self, refs: list[Any], verb: str, limit_s: float | None = None) -> list[Any]:
        """Results of one call for each rank from 0 on, or a failure that names the ranks without one.

        Once a rank has failed the others get no more than the heartbeat: they may be waiting for it.
        """
        limit_s = limit_s or self.config.start_timeout_s
        started = time.monotonic()
        deadline = started + limit_s
        results: dict[int, Any] = {}
        failed: dict[int, Failure] = {}
        waiting = {ref: rank for rank, ref in enumerate(refs)}
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            # all that are ready at once: one call for each would look through all ranks for each of them
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=min(left_s, LOOK_S))
            for ref in ready:
                rank = waiting.pop(ref)
                try:
                    results[rank] = ray.get(ref, timeout=self.config.heartbeat_s)
                except RayError as error:
                    failed[rank] = self._failure(rank, verb, error)
                    deadline = min(deadline, time.monotonic() + self.config.heartbeat_s)
        if not waiting and not failed:
            return [results[rank] for rank in range(len(refs))]
        missing = [self._name(rank) for rank in sorted(waiting.values())]
        waited_s = min(limit_s, round(time.monotonic() - started, 1)) if failed else limit_s
        late = f"{listed(missing, MOST_NAMED)} did not {verb} within {waited_s:g} s" if waiting else ""
        if not failed:
            raise GroupFailure(Failure(late, retryable=True))
        # a failure that would happen again explains the ranks that are late; any other is explained by them
        first = min(failed, key=lambda rank: failed[rank].retryable)
        failure, others = failed[first], [rank for rank in failed if rank != first]
        also = f"likewise {', '.join(map(self._name, sorted(others)))}" if others else ""
        causes = (late, failure.message, also) if failure.retryable else (failure.message, late)
        raise GroupFailure(replace(failure, message="; ".join(filter(None, causes))))

    def _failure(self, rank: int, verb: str, error: RayError) -> Failure:
        failure = classify(error)
        how = f"could not {verb}" if isinstance(error, RayTaskError) else "was lost" if failure.retryable else "failed"
        hint = f"; {CODE_HINT}, here {Path.cwd()}" if failure.message.endswith(NO_CODE) else ""
        return replace(failure, message=f"{self._name(rank)} {how}: {failure.message}{hint}")

    def _name(self, rank: int) -> str:
        return str(self.ranks[rank]) if self.ranks else f"rank {rank}"

    def end(self) -> None:
        """Kill the actors and release their resources; a broken group is never asked to clean up after itself.

        Waits `END_S` at most: without the head nothing is released, and ranks end by themselves (`lease_s`).
        """
        actors, watch = self._actors, self._watch
        self._actors, self._watch = [], None
        if self._head is not None and self._head.lost:
            return

        def release() -> None:
            if watch is not None:
                watch.end()
            for actor in actors:
                ray.kill(actor)
            self._placement.release()

        with suppress(TimeoutError, RayError, ConnectionError):
            run_with_timeout(END_S, "release the group", release)


def refuse_ranks(expected: str, errors: dict[RankInfo, str]) -> None:
    """Raise a ConfigError that names the ranks with an error, if there are any."""
    faults = [f"rank {rank.rank} on {rank.allocation.host}: {error}" for rank, error in errors.items() if error]
    if faults:
        raise ConfigError(f"{expected}{listed(faults, MOST_NAMED, '; ')}")


def lease_s(config: GroupConfig) -> float:
    """Seconds without a call from the controller after which a rank ends itself: longer than any pause between two
    calls, since all wait for the slowest while ranks start and join."""
    return LEASE_FACTOR * max(config.heartbeat_s, config.collective_timeout_s, config.start_timeout_s)
