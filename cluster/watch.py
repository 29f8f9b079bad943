"""What Ray says of the cluster while a group trains: nodes that are drained, and room for ranks that are missing."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.departures import ClusterView

LOOK_EVERY_S = 1.0
"""Pause between two looks; a look is one call of Ray's control service, and one more for each missing rank."""


class ClusterWatch:
    """Looks in a thread of its own: the controller never waits for Ray's control service.

    Room for a missing rank is a placement group of one bundle. While it is pending an autoscaler sees what is wanted;
    once it is placed nobody else takes the room.

    Parameters
    ----------
    bundle: what a rank needs.
    missing: ranks to keep room for.
    """

    def __init__(self, bundle: dict[str, float], missing: int) -> None:
        self._own_node = ray.get_runtime_context().get_node_id()
        self._bundle, self._missing = bundle, missing
        self._spare: list[PlacementGroup] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.latest = ClusterView()
        threading.Thread(target=self._run, name="cluster watch", daemon=True).start()

    def end(self) -> None:
        """Look no more, and give the room back."""
        self._ended.set()
        with self._lock:
            for spare in self._spare:
                remove_placement_group(spare)
            self._spare.clear()

    def _run(self) -> None:
        while not self._ended.is_set():
            # a cluster without its head is noticed by the group; any other look may go better
            with suppress(Exception), self._lock:
                self._look()
            self._ended.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        if self._ended.is_set():
            return
        draining = draining_nodes()
        room = 0
        for spare in list(self._spare):
            table = placement_group_table(spare)
            if draining.keys() & set(table.get("bundles_to_node_id", {}).values()):
                remove_placement_group(spare)  # it would stay on the node that goes
                self._spare.remove(spare)
            else:
                room += table.get("state") == "CREATED"
        while len(self._spare) < self._missing:
            self._spare.append(placement_group([self._bundle]))
        self.latest = ClusterView(draining, self._own_node, room)


def draining_nodes() -> dict[str, float | None]:
    """Id of every node that Ray drains → when it ends, in Unix time, or None. Ray has no public call for it."""
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: at_ms / 1000 if at_ms else None for node, at_ms in nodes.items()}


def nodes_to_place_on() -> list[dict[str, Any]]:
    """`ray.nodes()`, where nodes that Ray drains count as gone: it places nothing there."""
    draining = draining_nodes()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node | {"Alive": node["Alive"] and node["NodeID"] not in draining} for node in nodes]
