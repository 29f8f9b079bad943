"""Which rank runs where, whatever order Ray places bundles in; and a request that stays pending while nodes come."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import needs_of, shortage
from cluster.config import RunConfig
from cluster.mesh import MeshConfig
from cluster.network import administrators, use_interface
from cluster.placement import Placement, Seat, bundle_sizes, order_by_gpu, seats_of
from cluster.policy import GroupFailure
from tests.cluster.actors import limits
from tests.cluster.ray_nodes import Nodes

MESHES = st.builds(MeshConfig, channel=st.integers(1, 8), data=st.integers(1, 4), layer=st.integers(1, 3))


def nodes_of(seats: list[Seat]) -> list[str]:
    return [seat.node for seat in seats]


def assert_neighbours_share_a_node(seats: list[Seat]) -> None:
    """Every node's ranks are numbered without a gap."""
    runs = [seat.node for place, seat in enumerate(seats) if place == 0 or seats[place - 1].node != seat.node]
    assert len(runs) == len(set(runs)), nodes_of(seats)


# -- bundles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "room", "expected"),
    [
        ({"channel": 1}, [8], [1]),
        ({"channel": 8}, [8, 8], [8]),
        ({"data": 16}, [8, 0, 8], [8, 8]),
        ({"channel": 8, "data": 2}, [9, 9], [8, 8]),  # owners stay together
        ({"channel": 4, "data": 2}, [6, 6], [4, 4]),
        ({"channel": 2, "data": 3}, [5, 4], [4, 2]),
        ({"channel": 4, "data": 2, "layer": 2}, [8, 12], [8, 8]),  # a stage on each
        ({"channel": 4}, [3, 3], [3, 1]),  # no node has room for all owners
        ({"channel": 4}, [3], [1, 1, 1, 1]),  # too few yet: any node that comes fits
        ({"channel": 4}, [], [1, 1, 1, 1]),
    ],
)
def test_a_bundle_is_a_nodes_part_of_the_mesh(mesh: dict[str, int], room: list[int], expected: list[int]) -> None:
    assert bundle_sizes(MeshConfig(**mesh), room) == expected


@given(mesh=MESHES, room=st.lists(st.integers(0, 12), max_size=6))
def test_bundles_hold_all_ranks_and_fit(mesh: MeshConfig, room: list[int]) -> None:
    """Largest bundle first, each finds a node of its own, as Ray packs them."""
    sizes = bundle_sizes(mesh, room)
    assert sum(sizes) == mesh.world_size
    if sum(room) >= mesh.world_size:
        left = sorted(room, reverse=True)
        for size in sorted(sizes, reverse=True):
            fitting = [place for place, held in enumerate(left) if held >= size]
            assert fitting
            left[fitting[-1]] = 0


# -- seats -------------------------------------------------------------------------------------------------------------


def test_interleaved_bundles_give_neighbours_one_node() -> None:
    """As Ray has packed four nodes of eight GPUs: bundles 0, 2 and 3 on one, bundle 1 on another."""
    order = random.Random(7)
    placed = {bundle: f"node-{bundle % 4}" for bundle in range(32)}
    hosts = list(placed.values())
    order.shuffle(hosts)
    placed = dict(zip(placed, hosts, strict=True))
    seats = seats_of([1] * 32, placed, {f"node-{n}": f"10.0.0.{12 - n}" for n in range(4)})
    assert nodes_of(seats) == [f"node-{n}" for n in (3, 2, 1, 0) for _ in range(8)]  # by address, as a number
    assert sorted(seat.bundle for seat in seats) == list(range(32))
    assert all(placed[seat.bundle] == seat.node for seat in seats)


@given(mesh=MESHES, room=st.lists(st.integers(0, 12), max_size=6), seed=st.integers(0, 99))
def test_every_order_of_bundles_gives_neighbours_one_node(mesh: MeshConfig, room: list[int], seed: int) -> None:
    sizes = bundle_sizes(mesh, room)
    names = random.Random(seed)
    placed = {bundle: f"node-{names.randrange(4)}" for bundle in names.sample(range(len(sizes)), len(sizes))}
    addresses = {f"node-{n}": "127.0.0.1" for n in range(4)}  # several nodes of one machine are told apart as well
    seats = seats_of(sizes, placed, addresses)
    assert_neighbours_share_a_node(seats)
    assert Counter(seat.bundle for seat in seats) == dict(enumerate(sizes))


def test_nodes_with_the_most_ranks_come_first() -> None:
    """So that groups of owners stay together where another node has a part of one."""
    placed = {0: "a", 1: "b", 2: "b", 3: "a", 4: "b", 5: "c", 6: "b", 7: "c"}
    seats = seats_of([1] * 8, placed, {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"})
    assert nodes_of(seats) == ["b"] * 4 + ["a"] * 2 + ["c"] * 2


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([("0",), ("1",), ("2",), ("3",)], [0, 1, 2, 3]),
        ([("11",), ("2",), ("1",), ("0",)], [1, 0, 3, 2]),  # within each node
        ([("GPU-b",), ("GPU-a",), ("7",), ("GPU-c",)], [1, 0, 2, 3]),
        ([(), (), (), ()], [0, 1, 2, 3]),
    ],
)
def test_ranks_of_a_node_are_in_the_order_of_their_gpus(gpus: list[tuple[str, ...]], expected: list[int]) -> None:
    seats = [Seat(0, "b", "10.0.0.1"), Seat(0, "b", "10.0.0.1"), Seat(1, "a", "10.0.0.2"), Seat(2, "a", "10.0.0.2")]
    assert order_by_gpu(seats, gpus) == expected


def test_a_rank_needs_its_cpus_and_one_whole_gpu(digits_config: Callable[..., RunConfig]) -> None:
    assert needs_of(digits_config(2, cluster={"cpus_per_rank": 3})) == {"CPU": 3.0}
    assert needs_of(digits_config(2, device="cuda")) == {"CPU": 1.0, "GPU": 1.0}


def test_of_many_nodes_some_are_named() -> None:
    nodes = [{"Alive": True, "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": 2.0}} for n in range(20)]
    text = shortage({"CPU": 4.0}, 1, nodes)
    assert text.startswith("nodes: 10.0.0.0 with 2 CPU, ")
    assert text.endswith(", 10.0.0.7 with 2 CPU and 12 more; 1 rank more than there is room for")


# -- on nodes of Ray ---------------------------------------------------------------------------------------------------


CHOSEN = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "^docker"}


def add(nodes: Nodes, name: str, environment: dict[str, str] | None = None) -> Any:
    """A node with two CPUs and two GPUs, as Ray is told."""
    return nodes.add(num_cpus=2, num_gpus=2, resources={name: 1}, env_vars=environment or {})


@pytest.fixture(scope="module")
def two_nodes(nodes: Nodes) -> Nodes:
    """Node a, on which an administrator has chosen interfaces, and node b."""
    add(nodes, "a", CHOSEN)
    add(nodes, "b")
    return nodes


@pytest.fixture
def placed(two_nodes: Nodes) -> Iterator[Callable[[RunConfig], Placement]]:
    """Makes a placement, once the nodes are free, and takes it back."""
    import ray

    made: list[Placement] = []

    def make(config: RunConfig) -> Placement:
        deadline = time.monotonic() + 30.0
        while ray.available_resources().get("CPU", 0.0) < 4.0:
            assert time.monotonic() < deadline, ray.available_resources()
            time.sleep(0.05)
        made.append(Placement(config))
        return made[-1]

    yield make
    for placement in made:
        placement.release()


class Where:
    """An actor that knows where it is."""

    def place(self) -> tuple[str, tuple[str, ...]]:
        import ray

        return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))

    def interfaces(self) -> dict[str, str]:
        """What gloo and nccl would find."""
        use_interface("eth1")
        return {name: os.environ[name] for name in CHOSEN}


def actors_at(placement: Placement, seats: list[Seat]) -> list[tuple[str, tuple[str, ...]]]:
    """Node and GPUs of an actor on each seat, as the actor finds them."""
    import ray

    actors = [ray.remote(Where).options(**placement.options(seat)).remote() for seat in seats]
    found = ray.get([actor.place.remote() for actor in actors], timeout=60.0)
    for actor in actors:
        ray.kill(actor)
    return list(found)


@pytest.mark.slow
def test_ray_places_what_is_interleaved_and_neighbours_share_a_node(
    placed: Callable[[RunConfig], Placement], digits_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles 0 and 2 on node b, 1 and 3 on node a: what Ray may do with a bundle for each rank."""
    import ray

    def interleaved(bundles: list[dict[str, float]], strategy: str) -> Any:
        wanted = [bundle | {"ba"[index % 2]: 0.1} for index, bundle in enumerate(bundles)]
        return ray.util.placement_group(wanted, strategy=strategy)

    monkeypatch.setattr("cluster.placement.placement_group", interleaved)
    monkeypatch.setattr("cluster.placement.bundle_sizes", lambda mesh, room: [1] * mesh.world_size)
    placement = placed(digits_config(4, cluster=limits()))
    placement.request()
    placement.wait()
    seats = placement.seats()
    assert_neighbours_share_a_node(seats)
    assert [seat.bundle for seat in seats] in ([0, 2, 1, 3], [1, 3, 0, 2])
    assert [node for node, _ in actors_at(placement, seats)] == nodes_of(seats)


@pytest.mark.slow
def test_several_ranks_share_a_bundle_and_each_has_a_gpu_of_its_own(
    placed: Callable[[RunConfig], Placement], digits_config: Callable[..., RunConfig]
) -> None:
    placement = placed(digits_config(4, device="cuda", cluster=limits()))
    placement.request()
    placement.wait()
    seats = placement.seats()
    assert placement.sizes == [2, 2]
    assert [seat.bundle for seat in seats] in ([0, 0, 1, 1], [1, 1, 0, 0])
    found = actors_at(placement, seats)
    assert [node for node, _ in found] == nodes_of(seats)
    order = order_by_gpu(seats, [gpus for _, gpus in found])
    assert [found[rank][1] for rank in order] == [("0",), ("1",), ("0",), ("1",)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "expected"), [("a", CHOSEN), ("b", {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"})]
)
@pytest.mark.skipif("nccl" in administrators(), reason="this machine's nccl.conf decides")
def test_nothing_between_a_node_and_its_ranks_forces_an_interface(
    two_nodes: Nodes, node: str, expected: dict[str, str]
) -> None:
    """Neither Ray nor we replace what the environment of a node says; what is ours is exact."""
    import ray

    actor = ray.remote(Where).options(resources={node: 0.1}).remote()
    assert ray.get(actor.interfaces.remote(), timeout=60.0) == expected
    ray.kill(actor)


@pytest.mark.slow
def test_one_request_waits_for_nodes_that_come_late(
    two_nodes: Nodes, placed: Callable[[RunConfig], Placement], digits_config: Callable[..., RunConfig]
) -> None:
    import ray

    def requests() -> dict[str, str]:
        table = ray.util.placement_group_table()
        return {name: group["state"] for name, group in table.items() if group["state"] != "REMOVED"}

    placement = placed(digits_config(5, cluster=limits()))
    notes: list[str] = []
    placement.request()
    (pending,) = requests().items()
    with ThreadPoolExecutor(1) as pool:  # nodes are added by the main thread only
        waiting = pool.submit(placement.wait, notes.append)
        while not notes:
            assert not waiting.done(), waiting.result()
            time.sleep(0.05)
        assert requests() == dict([pending]) == {pending[0]: "PENDING"}  # what an autoscaler sees
        late = add(two_nodes, "c")
        waiting.result()
    assert requests() == {pending[0]: "CREATED"}
    assert notes[0].startswith("waiting for room for 5 ranks of 1 CPU, at most 60 s (cluster.placement_timeout_s), ")
    assert "free now: 4 CPU; nodes: " in notes[0]
    assert notes[0].endswith("1 rank more than there is room for")
    assert notes[-1].startswith("room for 5 ranks of 1 CPU after ")
    seats = placement.seats()
    assert_neighbours_share_a_node(seats)
    assert sorted(Counter(nodes_of(seats)).values()) == [1, 2, 2]
    placement.release()
    two_nodes.cluster.remove_node(late)


@pytest.mark.slow
def test_ranks_whose_node_is_gone_may_be_apart(
    placed: Callable[[RunConfig], Placement], digits_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four were to be on one node; those that are left have room for two each."""
    monkeypatch.setattr("cluster.placement.bundle_sizes", lambda mesh, room: [mesh.world_size])
    placement = placed(digits_config(4, cluster=limits(start_timeout_s=1.0)))
    notes: list[str] = []
    placement.request()
    placement.wait(notes.append)
    assert "no node has room for 4 ranks together any more: they may be apart" in notes
    assert_neighbours_share_a_node(placement.seats())


@pytest.mark.slow
def test_the_wait_has_a_limit_of_its_own(
    placed: Callable[[RunConfig], Placement], digits_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.placement.TELL_AGAIN_S", 0.1)
    monkeypatch.setattr("cluster.placement.LOOK_EVERY_S", 0.1)
    monkeypatch.setattr("cluster.placement.FIRST_LOOK_S", 0.1)
    placement = placed(digits_config(6, cluster=limits(placement_timeout_s=3.0)))
    notes: list[str] = []
    placement.request()
    with pytest.raises(GroupFailure) as caught:
        placement.wait(notes.append)
    assert not caught.value.failure.retryable
    assert str(caught.value).startswith("no room for 6 ranks of 1 CPU within 3 s; free now: 4 CPU; nodes: ")
    assert str(caught.value).endswith("; cluster.placement_timeout_s=3")
    assert 2 <= len(notes) <= 6  # every pause is twice as long as the one before
