"""Where ranks run: resources for all of them, reserved together, and which rank sits where.

Ray places the bundles of a placement group in any order: bundle 1 may be on another node than bundles 0 and 2. Here a
bundle holds as many ranks as a node has room for, and ranks are numbered by node, then by GPU, so that neighbours in
rank share a node. The axis of a mesh whose ranks wait for each other most is the innermost one, see `cluster.mesh`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.capacity import fitting, needs_of, room_for, shortage
from cluster.config import RunConfig
from cluster.failures import classify
from cluster.mesh import MeshConfig
from cluster.policy import Failure, GroupFailure
from cluster.text import count
from cluster.timeouts import run_with_timeout
from cluster.watch import nodes_to_place_on
from simmatch.config import ConfigError

Result = TypeVar("Result")

FIRST_LOOK_S = 1.0
"""A group that has not been placed by then is waited for, and a person is told."""

LOOK_EVERY_S = 2.0
"""Pause between two looks at what the cluster has, while it is waited for."""

TELL_AGAIN_S = 60.0
"""Pause before a wait is told again where the nodes are the same; twice as long each time."""


@dataclass(frozen=True)
class Seat:
    """Where a rank runs.

    Attributes
    ----------
    bundle: of the placement group; other ranks may share it.
    node: Ray's id of the node.
    address: of the node.
    """

    bundle: int
    node: str
    address: str


def bundle_sizes(mesh: MeshConfig, room: Sequence[int]) -> list[int]:
    """Ranks in each bundle: one bundle on each of the fewest nodes, or one for each rank where they do not all fit.

    Nodes hold whole stages where that is possible, or else whole groups of owners.

    room: ranks that each node has room for now.

    >>> bundle_sizes(MeshConfig(channel=8, data=2), [8, 3, 8])
    [8, 8]
    >>> bundle_sizes(MeshConfig(channel=4, data=2), [6, 6])
    [4, 4]
    >>> bundle_sizes(MeshConfig(channel=3), [1, 1])
    [1, 1, 1]
    """
    for unit in (mesh.channel * mesh.data, mesh.channel, 1):
        left, sizes = mesh.world_size, []
        for held in sorted((ranks // unit * unit for ranks in room), reverse=True):
            if min(held, left) > 0:
                sizes.append(min(held, left))
                left -= sizes[-1]
        if left == 0:
            return sizes
    return [1] * mesh.world_size


def seats_of(sizes: Sequence[int], placed: Mapping[int, str], addresses: Mapping[str, str]) -> list[Seat]:
    """The seat of every rank: nodes with the most ranks first, then in the order of their addresses.

    Parameters
    ----------
    sizes: ranks in each bundle.
    placed: bundle → id of its node, in whatever order Ray has placed them.
    addresses: id of a node → its address.

    >>> [seat.node for seat in seats_of([1, 1, 1], {0: "b", 1: "a", 2: "b"}, {"a": "10.0.0.2", "b": "10.0.0.10"})]
    ['b', 'b', 'a']
    """
    ranks = Counter(dict.fromkeys(placed.values(), 0))
    for bundle, node in placed.items():
        ranks[node] += sizes[bundle]

    def order(bundle: int) -> tuple[Any, ...]:
        node = placed[bundle]
        numbers = [int(digits) for digits in re.findall(r"\d+", addresses[node])]
        return -ranks[node], numbers, addresses[node], node, -sizes[bundle], bundle

    return [
        Seat(bundle, placed[bundle], addresses[placed[bundle]])
        for bundle in sorted(placed, key=order)
        for _ in range(sizes[bundle])
    ]


def order_by_gpu(seats: Sequence[Seat], gpus: Sequence[tuple[str, ...]]) -> list[int]:
    """The ranks in a better order: as before between nodes, by GPU on each, whatever GPUs Ray has given to them.

    gpus: of each rank.

    >>> order_by_gpu([Seat(0, "a", "10.0.0.1")] * 3 + [Seat(1, "b", "10.0.0.2")], [("10",), ("9",), ("0",), ("1",)])
    [2, 1, 0, 3]
    """
    nodes = list(dict.fromkeys(seat.node for seat in seats))

    def order(rank: int) -> tuple[Any, ...]:
        numbers = [[(not name.isdecimal(), int(name) if name.isdecimal() else 0, name)] for name in gpus[rank]]
        return nodes.index(seats[rank].node), numbers, rank

    return sorted(range(len(seats)), key=order)


def ask_ray(limit_s: float, verb: str, call: Callable[[], Result]) -> Result:
    """A call to Ray's control service, which has no limit of its own.

    Raises
    ------
    GroupFailure
        The service did not answer, or refused; the message says what it was asked for.
    """
    try:
        return run_with_timeout(limit_s, verb, call)
    except TimeoutError as error:
        raise GroupFailure(Failure(f"the Ray cluster did not {error}", retryable=False)) from error
    except Exception as error:
        failure = classify(error)
        retryable = failure.retryable or type(error) is Exception  # as Ray says "Placement group … does not exist"
        message = f"the Ray cluster did not {verb}: {failure.message}"
        raise GroupFailure(replace(failure, message=message, retryable=retryable)) from error


class Placement:
    """One placement group for all ranks of a group, kept while it is pending: an autoscaler sees what is wanted.

    Parameters
    ----------
    config: of the run.
    grows: whether nodes may join the cluster; one that is only this process's own never gets any.

    Attributes
    ----------
    needs: what Ray reserves for a rank.
    sizes: ranks in each bundle, once they are requested.
    """

    def __init__(self, config: RunConfig, *, grows: bool = True) -> None:
        self.config, self.limits, self.grows = config, config.cluster, grows
        self.needs = needs_of(config)
        self.ranks = config.mesh.world_size
        self.sizes: list[int] = []
        self._group: PlacementGroup | None = None

    def request(self) -> None:
        """Ask for the resources; does not wait for them.

        Raises
        ------
        ConfigError
            No nodes can join the cluster, and it is too small.
        """
        nodes = self._ask("list its nodes", nodes_to_place_on)
        if not self.grows:
            self._refuse_small(nodes)
        free = self._ask("report its resources", ray._private.state.available_resources_per_node)
        alive = [node["NodeID"] for node in nodes if node["Alive"]]
        self._reserve(bundle_sizes(self.config.mesh, [fitting(self.needs, free.get(node, {})) for node in alive]))

    def _reserve(self, sizes: list[int]) -> None:
        self.sizes = sizes
        bundles = [{kind: size * amount for kind, amount in self.needs.items()} for size in self.sizes]
        self._group = self._ask("create a placement group", partial(placement_group, bundles, strategy="PACK"))

    def wait(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Wait until all resources are reserved, `cluster.placement_timeout_s` at most.

        Where a node that had room for several ranks is gone or used by others, and there is room for each elsewhere,
        each gets a bundle of its own after `cluster.start_timeout_s`.

        note: told at once what is waited for, then where nodes have come or gone, and sparsely otherwise.

        Raises
        ------
        GroupFailure
            They are not in time; or, where the group may shrink, there is room for a smaller one and no more after
            `cluster.start_timeout_s`.
        """
        began = time.monotonic()
        limit_s = self.limits.placement_timeout_s
        told, tell_at, pause_s = "", 0.0, TELL_AGAIN_S
        while not self._ready(min(LOOK_EVERY_S if told else FIRST_LOOK_S, limit_s)):
            waited_s = time.monotonic() - began
            free, held, room = self._look()
            if waited_s >= limit_s or self._may_shrink(waited_s, room):
                raise GroupFailure(self._no_room(min(waited_s, limit_s), f"{free}; {held}", room))
            if room >= self.ranks and max(self.sizes) > 1 and waited_s >= self.limits.start_timeout_s:
                note(f"no node has room for {max(self.sizes)} ranks together any more: they may be apart")
                self.release()
                self._reserve([1] * self.ranks)
            if held != told or waited_s >= tell_at:
                until = f"at most {limit_s:g} s (cluster.placement_timeout_s)"
                note(f"waiting for room for {self._wanted}, {until}, {waited_s:.0f} s so far: {free}; {held}")
                pause_s = TELL_AGAIN_S if held != told else 2 * pause_s
                told, tell_at = held, waited_s + pause_s
        if told:
            note(f"room for {self._wanted} after {time.monotonic() - began:.0f} s")

    def seats(self) -> list[Seat]:
        """Where each rank is placed.

        Raises
        ------
        GroupFailure
            A node has been lost since: it is missing from Ray's table of placement groups, or from its list of nodes.
        """
        nodes = {node["NodeID"]: node for node in self._ask("list its nodes", ray.nodes) if node["Alive"]}
        table = self._ask("report its placement groups", partial(placement_group_table, self._group))
        placed = {bundle: node for bundle, node in table.get("bundles_to_node_id", {}).items() if node in nodes}
        gone = [bundle for bundle in range(len(self.sizes)) if bundle not in placed]
        if gone:
            ranks = sum(self.sizes[bundle] for bundle in gone)
            message = f"{count(ranks, 'rank')} of {self.ranks}: lost before the start, with the node"
            raise GroupFailure(Failure(message, retryable=True))
        return seats_of(self.sizes, placed, {node: nodes[node]["NodeManagerAddress"] for node in placed.values()})

    def options(self, seat: Seat) -> dict[str, Any]:
        """Options of the actor of a rank that sits there."""
        assert self._group is not None
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=seat.bundle
        )
        gpus = int(self.needs.get("GPU", 0))
        return {"num_cpus": self.limits.cpus_per_rank, "num_gpus": gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the resources back, or stop asking for them."""
        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)

    @property
    def _wanted(self) -> str:
        """Such as `8 ranks of 1 CPU and 1 GPU`."""
        return f"{count(self.ranks, 'rank')} of " + " and ".join(f"{n:g} {kind}" for kind, n in self.needs.items())

    def _ready(self, limit_s: float) -> bool:
        assert self._group is not None
        return self._ask("reserve resources", partial(self._group.wait, limit_s), limit_s)

    def _look(self) -> tuple[str, str, int]:
        """What is free now, which nodes there are and what they lack, and for how many ranks there is room."""
        free = self._ask("report its resources", ray.available_resources)
        nodes = self._ask("list its nodes", nodes_to_place_on)
        amounts = ", ".join(f"{free.get(kind, 0.0):g} {kind}" for kind in self.needs)
        return f"free now: {amounts}", shortage(self.needs, self.ranks, nodes), room_for(self.needs, free, nodes)

    def _may_shrink(self, waited_s: float, room: int) -> bool:
        least = self.limits.min_shards
        return least is not None and least <= room < self.ranks and waited_s >= self.limits.start_timeout_s

    def _no_room(self, waited_s: float, found: str, room: int) -> Failure:
        message = f"no room for {self._wanted} within {waited_s:.0f} s; {found}"
        least = self.limits.min_shards
        if least is not None and room >= least:
            return Failure(message, retryable=True, fits=room)
        return Failure(f"{message}; cluster.placement_timeout_s={self.limits.placement_timeout_s:g}", retryable=False)

    def _refuse_small(self, nodes: list[dict[str, Any]]) -> None:
        """Refuse a cluster that has no room for the ranks even while nothing else runs on it."""
        total = self._ask("report its resources", ray.cluster_resources)
        for kind, amount in self.needs.items():
            if total.get(kind, 0.0) < amount * self.ranks:
                raise ConfigError(
                    f"mesh: expected a cluster with at least {amount * self.ranks:g} {kind} "
                    f"for {count(self.ranks, 'rank')}, got one with {total.get(kind, 0.0):g}"
                )
        if room_for(self.needs, total, nodes) < self.ranks:  # such as nodes with half a GPU each
            held = shortage(self.needs, self.ranks, nodes)
            raise ConfigError(f"mesh: expected nodes with room for {self._wanted}, got {held}")

    def _ask(self, verb: str, call: Callable[[], Result], limit_s: float = 0.0) -> Result:
        return ask_ray(limit_s + self.limits.heartbeat_s, verb, call)
