"""A group of ranks as Ray actors: placed, started, joined, polled, and ended as one.

For training `ray.remote` appears here only. Control goes through Ray, tensors never do. Every wait has a limit, and
its message names the ranks that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import GroupConfig
from cluster.cpus import threads_per_rank
from cluster.failures import classify
from cluster.limits import run_with_timeout
from cluster.network import LOOPBACK, Head
from cluster.policy import Failure
from cluster.reach import heard, leave
from cluster.training import Assignment
from cluster.worker import Place, Status, Worker
from simmatch.config import ConfigError

Result = TypeVar("Result")

LEASES = 2.0
"""How long a rank outlives its controller, over the longest pause that a controller which is well makes."""

MOST_NAMED = 3
"""Nodes or ranks in one message."""

END_S = 10.0
"""Longest wait for Ray to take back actors and places at the end of a group."""

NO_CODE = ("No module named 'cluster'", "No module named 'simmatch'")
"""End of the error where a node has this project's packages from nowhere."""

CODE_HINT = "every node needs the job's upload (ray job submit --working-dir) or the checkout at the driver's path"


class GroupFailure(RuntimeError):
    """The group cannot go on."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


class WorkerGroup:
    """The ranks of one generation.

    Parameters
    ----------
    assignment: what rank 0 is told; every rank gets the same with its own number.
    worker_class: the class made into actors.
    """

    def __init__(self, assignment: Assignment, worker_class: type[Worker] = Worker) -> None:
        self.assignment, self.worker_class = assignment, worker_class
        self.config = assignment.config.cluster
        self.world_size = assignment.config.checked_mesh().world_size
        self.places: list[Place] = []
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._seen = [0] * self.world_size
        self._head: Head | None = None

    def start(self) -> None:
        """Place the actors, let them meet, and begin to train.

        Raises
        ------
        ConfigError
            The cluster cannot hold the group, or a node does not reach the run directory.
        GroupFailure
            A rank did not come up in time.
        """
        self._head = Head(ray.get_runtime_context().gcs_address, self.config.heartbeat_s)
        self._check_own_node()
        self._place()
        self._ask("start actors", self._create)
        addresses = self._addresses()
        nonce = self._at_run_dir(lambda: leave(self.assignment.run_dir, self.assignment.token))
        calls = [actor.describe.remote(address) for actor, address in zip(self._actors, addresses, strict=True)]
        self.places = self._gather(calls, "start")
        self._check_reach(nonce)
        if self.world_size > 1:
            self._rendezvous()
        threads = self.config.threads_per_rank or threads_per_rank(self.places)
        self._gather([actor.begin.remote(threads) for actor in self._actors], "begin")

    def _check_own_node(self) -> None:
        """A driver whose own node is gone owns nothing any more: Ray ends every actor that it makes."""
        own = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == own and not node["Alive"] for node in self._ask("list its nodes", ray.nodes)):
            raise GroupFailure(Failure("the Ray node that this job's driver runs on is gone", retryable=False))

    def _at_run_dir(self, call: Callable[[], Result]) -> Result:
        """What is done in the run directory from here; a folder that hangs, or takes nothing now, may be well later."""
        try:
            return run_with_timeout(self.config.start_timeout_s, str(self.assignment.run_dir), call)
        except OSError as error:  # a TimeoutError is one
            message = f"the run directory cannot be used: {' '.join(str(error).split())}"
            raise GroupFailure(Failure(message, retryable=True)) from error

    def _check_reach(self, nonce: str) -> None:
        """Refuse a run directory that is another one on another node, before anything is trained."""
        told = self.assignment
        answers = [place.reach for place in self.places]
        faults = self._at_run_dir(lambda: heard(told.run_dir, told.token, nonce, answers))
        words = [f"rank {p.rank} on {p.host} {why}" for p, why in zip(self.places, faults, strict=True) if why]
        if words:
            more = f"; and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
            raise ConfigError(
                f"--run-dir: expected a place that all nodes share, got {told.run_dir}: "
                f"{'; '.join(words[:MOST_NAMED])}{more}"
            )

    def _place(self) -> None:
        bundle = {"CPU": float(self.config.cpus_per_rank)}
        if self.assignment.config.device == "cuda":
            bundle["GPU"] = 1.0  # one whole GPU: nccl refuses to share one between ranks
        total = self._ask("tell its resources", ray.cluster_resources)
        for kind, amount in bundle.items():
            # a cluster that has held the group before may have lost a node for a while
            if total.get(kind, 0.0) < amount * self.world_size and self.assignment.generation == 0:
                raise ConfigError(
                    f"mesh: expected a cluster with at least {amount * self.world_size:g} {kind} "
                    f"for {self.world_size} ranks, got one with {total.get(kind, 0.0):g}"
                )
        self._placement = self._ask("make places", lambda: placement_group([bundle] * self.world_size, strategy="PACK"))
        limit_s = self.config.start_timeout_s
        if not self._ask("find places", partial(self._placement.wait, limit_s), limit_s):
            free = self._ask("tell its resources", ray.available_resources)
            nodes = self._ask("list its nodes", ray.nodes)
            raise GroupFailure(
                Failure(
                    f"no place for {self.world_size} ranks of {bundle} within {limit_s:g} s; "
                    f"free now: { {kind: free.get(kind, 0.0) for kind in bundle} }; "
                    f"{shortage(bundle, self.world_size, nodes)}",
                    retryable=True,
                    fits=room_for(bundle, free, nodes),
                )
            )

    def _create(self) -> None:
        assert self._placement is not None
        gpus = 1 if self.assignment.config.device == "cuda" else 0
        actor_class = ray.remote(self.worker_class)
        for rank in range(self.world_size):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self._placement, placement_group_bundle_index=rank
            )
            options = {"num_cpus": self.config.cpus_per_rank, "num_gpus": gpus, "max_restarts": 0}
            actor = actor_class.options(scheduling_strategy=strategy, **options)
            self._actors.append(actor.remote(replace(self.assignment, rank=rank)))
            self._actors[-1].expire_after.remote(lease_s(self.config))

    def _addresses(self) -> list[str]:
        """Address of the node that each rank was placed on.

        A node that has been lost in the meantime is no more in the table of places, or is not there to be asked.
        """
        nodes = {node["NodeID"]: node for node in self._ask("list its nodes", ray.nodes) if node["Alive"]}
        table = self._ask("tell places", partial(ray.util.placement_group_table, self._placement))
        placed = table.get("bundles_to_node_id", {})
        gone = [rank for rank in range(self.world_size) if placed.get(rank) not in nodes]
        if gone:
            names = ", ".join(str(rank) for rank in gone)
            raise GroupFailure(Failure(f"rank {names} was lost: its node is gone before it started", retryable=True))
        return [nodes[placed[rank]]["NodeManagerAddress"] for rank in range(self.world_size)]

    def _ask(self, verb: str, call: Callable[[], Result], limit_s: float = 0.0) -> Result:
        """A question to Ray's control service, which has no limit of its own beyond the call's `limit_s`."""
        try:
            return run_with_timeout(limit_s + self.config.heartbeat_s, verb, call)
        except TimeoutError as error:
            raise GroupFailure(Failure(f"the Ray cluster did not {error}", retryable=False)) from error
        except Exception as error:
            failure = classify(error)
            lost = failure.retryable or type(error) is Exception  # as Ray says "Placement group … does not exist"
            message = f"the Ray cluster did not {verb}: {failure.message}"
            raise GroupFailure(replace(failure, message=message, retryable=lost)) from error

    def _rendezvous(self) -> None:
        """Rank 0 binds a store, all join it: on loopback where they share a machine."""
        single = len({place.address for place in self.places}) == 1
        addresses = [LOOPBACK if single else place.address for place in self.places]
        interface = self.config.interface
        (store,) = self._gather([self._actors[0].bind.remote(interface, addresses[0])], "bind its store", [0])
        self._gather(
            [
                actor.join.remote(interface, address, store)
                for actor, address in zip(self._actors, addresses, strict=True)
            ],
            "join the group",
        )

    def poll(self) -> list[Status]:
        """Status of every rank, each with its new messages.

        Raises
        ------
        GroupFailure
            A rank died, or did not answer within the heartbeat; or the head of Ray's cluster did not.
        """
        refs = [actor.poll.remote(seen) for actor, seen in zip(self._actors, self._seen, strict=True)]
        statuses: list[Status] = self._gather(refs, "answer", limit_s=self.config.heartbeat_s)
        self._check_head()
        self._seen = [seen + len(status.messages) for seen, status in zip(self._seen, statuses, strict=True)]
        return statuses

    def _check_head(self) -> None:
        """Actors answer without the head, but nothing could be replaced any more, and Ray would end this process."""
        assert self._head is not None
        if self._head.lost:
            where, limit_s = self._head.address, self._head.limit_s
            message = f"the head of the Ray cluster at {where} has not answered for {limit_s:g} s"
            raise GroupFailure(Failure(message, retryable=False))

    def stop(self) -> None:
        """Ask all ranks to stop at a step that they agree on. Does not wait; their status tells."""
        for actor in self._actors:
            actor.stop.remote()

    def _gather(
        self, refs: list[Any], verb: str, ranks: list[int] | None = None, limit_s: float | None = None
    ) -> list[Any]:
        """Results of one call per rank, or a failure that names the ranks which did not deliver.

        Once one of them has failed the others get no more than the heartbeat: they may be waiting for it.
        """
        limit_s = limit_s or self.config.start_timeout_s
        ranks = ranks or list(range(len(refs)))
        deadline = time.monotonic() + limit_s
        results: dict[int, Any] = {}
        failed: list[Failure] = []
        waiting = dict(zip(refs, ranks, strict=True))
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left_s)
            for ref in ready:
                rank = waiting.pop(ref)
                try:
                    results[rank] = ray.get(ref, timeout=self.config.heartbeat_s)
                except RayError as error:
                    failed.append(self._failure(rank, verb, error))
                    deadline = min(deadline, time.monotonic() + self.config.heartbeat_s)
        if not waiting and not failed:
            return [results[rank] for rank in ranks]
        missing = ", ".join(self._name(rank) for rank in sorted(waiting.values()))
        late = f"{missing} did not {verb} within {limit_s:g} s" if waiting else ""
        if not failed:
            raise GroupFailure(Failure(late, retryable=True))
        # a fault would come again and explains those that are late; a loss is explained by them, or by what came first
        failure = min(failed, key=lambda failure: failure.retryable)
        told = (late, failure.message) if failure.retryable else (failure.message, late)
        raise GroupFailure(replace(failure, message="; ".join(filter(None, told))))

    def _failure(self, rank: int, verb: str, error: RayError) -> Failure:
        failure = classify(error)
        how = f"could not {verb}" if isinstance(error, RayTaskError) else "was lost" if failure.retryable else "failed"
        hint = f"; {CODE_HINT}, here {Path.cwd()}" if failure.message.endswith(NO_CODE) else ""
        return replace(failure, message=f"{self._name(rank)} {how}: {failure.message}{hint}")

    def _name(self, rank: int) -> str:
        if not self.places:
            return f"rank {rank}"
        place = self.places[rank]
        return f"rank {rank} (pid {place.pid} on {place.host})"

    def end(self) -> None:
        """Kill the actors and give their places back; a broken group is never asked to clean up after itself.

        Waits `END_S` at most: without the head nobody takes them back, and ranks end by themselves (`lease_s`).
        """
        actors, placement = self._actors, self._placement
        self._actors, self._placement = [], None
        if self._head is not None and self._head.lost:
            return

        def give_back() -> None:
            for actor in actors:
                ray.kill(actor)
            if placement is not None:
                remove_placement_group(placement)

        with suppress(TimeoutError, RayError, ConnectionError):
            run_with_timeout(END_S, "take back a group", give_back)


def lease_s(config: GroupConfig) -> float:
    """Seconds without a word from the controller after which a rank ends itself: longer than any pause between two
    calls, since while ranks start and meet all wait for the slowest."""
    return LEASES * max(config.heartbeat_s, config.collective_timeout_s, config.start_timeout_s)


def room_for(bundle: dict[str, float], free: dict[str, float], nodes: list[dict[str, Any]]) -> int:
    """How many bundles the nodes that are alive have room for: at most what is free in the cluster, node by node."""
    on_nodes = sum(fitting(bundle, node["Resources"]) for node in nodes if node["Alive"])
    return min(on_nodes, fitting(bundle, free))


def fitting(bundle: dict[str, float], resources: dict[str, float]) -> int:
    """How many bundles these resources are."""
    return min(int(resources.get(kind, 0.0) // amount) for kind, amount in bundle.items())


def shortage(bundle: dict[str, float], ranks: int, nodes: list[dict[str, Any]]) -> str:
    """What the cluster has and lacks, for a message.

    >>> node = {"Alive": True, "NodeManagerAddress": "10.0.0.7", "Resources": {"CPU": 3.0}}
    >>> shortage({"CPU": 2.0}, 2, [node, {"Alive": False, "NodeManagerAddress": "10.0.0.8", "Resources": {}}])
    'nodes: 10.0.0.7 with 3 CPU; gone: 10.0.0.8; 1 rank more than there is room for'
    """
    alive = [node for node in nodes if node["Alive"]]
    held = [
        f"{node['NodeManagerAddress']} with "
        + " and ".join(f"{node['Resources'].get(kind, 0.0):g} {kind}" for kind in bundle)
        for node in alive
    ]
    # Ray remembers every node that there ever was
    gone = sorted({node["NodeManagerAddress"] for node in nodes} - {node["NodeManagerAddress"] for node in alive})
    parts = [f"nodes: {', '.join(held) or 'none'}"]
    if gone:
        parts.append(f"gone: {', '.join(gone[:MOST_NAMED])}{' and more' if len(gone) > MOST_NAMED else ''}")
    lacking = ranks - sum(fitting(bundle, node["Resources"]) for node in alive)
    if lacking > 0:
        parts.append(f"{lacking} rank{'s' if lacking > 1 else ''} more than there is room for")
    return "; ".join(parts)
