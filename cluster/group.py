"""A group of ranks as Ray actors: placed, started, joined, polled, and ended as one.

`ray.remote` appears here only. Control goes through Ray, tensors never do. Every wait has a limit, and its message
names the ranks that are missing.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.network import LOOPBACK
from cluster.policy import Failure
from cluster.training import Assignment
from cluster.worker import Place, Status, Worker
from simmatch.config import ConfigError


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
        self.world_size = assignment.config.place().world_size
        self.places: list[Place] = []
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._seen = [0] * self.world_size

    def start(self) -> None:
        """Place the actors, let them meet, and begin to train.

        Raises
        ------
        ConfigError
            The cluster cannot hold the group.
        GroupFailure
            A rank did not come up in time.
        """
        self._place()
        self._create()
        addresses = self._addresses()
        calls = [actor.describe.remote(address) for actor, address in zip(self._actors, addresses, strict=True)]
        self.places = self._gather(calls, "start")
        if self.world_size > 1:
            self._rendezvous()
        threads = self.config.threads_per_rank or self._threads()
        self._gather([actor.begin.remote(threads) for actor in self._actors], "begin")

    def _place(self) -> None:
        bundle = {"CPU": float(self.config.cpus_per_rank)}
        if self.assignment.config.device == "cuda":
            bundle["GPU"] = 1.0  # one whole GPU: nccl refuses to share one between ranks
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for kind, amount in bundle.items():
            # a cluster that has held the group before may have lost a node for a while
            if total.get(kind, 0.0) < amount * self.world_size and self.assignment.generation == 0:
                raise ConfigError(
                    f"mesh: expected a cluster with at least {amount * self.world_size:g} {kind} "
                    f"for {self.world_size} ranks, got one with {total.get(kind, 0.0):g}"
                )
        self._placement = placement_group([bundle] * self.world_size, strategy="PACK")
        if not self._placement.wait(self.config.start_timeout_s):
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            raise GroupFailure(
                Failure(
                    f"no place for {self.world_size} ranks of {bundle} within {self.config.start_timeout_s:g} s; "
                    f"free now: { {kind: free.get(kind, 0.0) for kind in bundle} }",
                    lost=True,
                    fits=room_for(bundle, free),
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

    def _addresses(self) -> list[str]:
        """Address of the node that each rank was placed on."""
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}  # type: ignore[no-untyped-call]
        placed = ray.util.placement_group_table(self._placement)["bundles_to_node_id"]
        return [nodes[placed[rank]] for rank in range(self.world_size)]

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

    def _threads(self) -> int:
        """CPUs of the fullest machine, shared by its ranks."""
        hosts = [place.address for place in self.places]
        return max(1, (os.cpu_count() or 1) // max(hosts.count(host) for host in hosts))

    def poll(self) -> list[Status]:
        """Status of every rank, each with its new events.

        Raises
        ------
        GroupFailure
            A rank died, or did not answer within the heartbeat.
        """
        refs = [actor.poll.remote(seen) for actor, seen in zip(self._actors, self._seen, strict=True)]
        statuses: list[Status] = self._gather(refs, "answer", limit_s=self.config.heartbeat_s)
        self._seen = [seen + len(status.events) for seen, status in zip(self._seen, statuses, strict=True)]
        return statuses

    def stop(self) -> None:
        """Ask all ranks to stop at a step that they agree on. Does not wait; their status tells."""
        for actor in self._actors:
            actor.stop.remote()

    def _gather(
        self, refs: list[Any], verb: str, ranks: list[int] | None = None, limit_s: float | None = None
    ) -> list[Any]:
        """Results of one call per rank, or a failure that names the ranks which did not deliver."""
        limit_s = limit_s or self.config.start_timeout_s
        ranks = ranks or list(range(len(refs)))
        _, late = ray.wait(refs, num_returns=len(refs), timeout=limit_s)
        if late:
            missing = ", ".join(self._name(rank) for rank, ref in zip(ranks, refs, strict=True) if ref in late)
            raise GroupFailure(Failure(f"{missing} did not {verb} within {limit_s:g} s", lost=True))
        results: list[Any] = []
        failed: list[Failure] = []
        for rank, ref in zip(ranks, refs, strict=True):
            try:
                results.append(ray.get(ref, timeout=limit_s))
            except (RayActorError, GetTimeoutError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                failed.append(Failure(f"{self._name(rank)} was lost: {reason}", lost=True))
            except RayTaskError as error:
                cause = error.cause if error.cause is not None else error
                failed.append(Failure(f"{self._name(rank)} failed: {cause}", lost=False))
        if failed:
            # a rank that died explains what the others waited for in vain
            raise GroupFailure(max(failed, key=lambda failure: failure.lost))
        return results

    def _name(self, rank: int) -> str:
        if not self.places:
            return f"rank {rank}"
        place = self.places[rank]
        return f"rank {rank} (pid {place.pid} on {place.host})"

    def end(self) -> None:
        """Kill the actors and give their places back; a broken group is never asked to clean up after itself."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None


def room_for(bundle: dict[str, float], free: dict[str, float]) -> int:
    """How many bundles the nodes that are alive have room for: at most what is free in the cluster, node by node."""
    on_nodes = 0
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            on_nodes += min(int(node["Resources"].get(kind, 0.0) // amount) for kind, amount in bundle.items())
    return min([on_nodes, *(int(free.get(kind, 0.0) // amount) for kind, amount in bundle.items())])
