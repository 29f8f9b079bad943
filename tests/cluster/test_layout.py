"""Which ranks share a node, what they are told of it, and what they leave idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.allocation import Allocation
from cluster.config import RunConfig
from cluster.layout import RankInfo, idle_gpus, oversubscribed, threads_per_rank
from cluster.messages import GroupStarted


def on_hosts(*hosts: tuple[str, int], **more: Any) -> list[RankInfo]:
    held = [Allocation(host, f"10.0.0.{host}", cpus, **more) for host, cpus in hosts]
    return [RankInfo(rank, 7 + rank, allocation) for rank, allocation in enumerate(held)]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([("1", 8)], 8),
        ([("1", 8), ("1", 8)], 4),
        ([("1", 64), ("2", 4)], 4),  # the smallest allocation decides for all
        ([("1", 64), ("1", 64), ("1", 64), ("2", 30)], 21),
        ([("1", 1), ("1", 1)], 1),
    ],
)
def test_the_smallest_allocation_decides(hosts: list[tuple[str, int]], expected: int) -> None:
    assert threads_per_rank(on_hosts(*hosts)) == expected


def test_a_host_that_allows_fewer_is_named() -> None:
    assert oversubscribed(on_hosts(("1", 8), ("2", 6), ("2", 6)), 3) == []
    ranks = on_hosts(("1", 8), ("2", 6), ("2", 6), cores=64, limited_by="control group")
    (line,) = oversubscribed(ranks, 4)
    assert line == (
        "2 (10.0.0.2): 6 CPUs (of 64, by its control group) for 2 ranks, fewer than cluster.threads_per_rank=4 for "
        "each: slower, same bits; cluster.threads_per_rank=3 for a new run"
    )
    (line,) = oversubscribed(on_hosts(("1", 1), ("1", 1)), 1)
    assert line.endswith("; fewer ranks on a node (cluster.cpus_per_rank)")  # there are no fewer threads


def test_the_layout_names_every_node() -> None:
    chosen = {"nccl": "NCCL_SOCKET_IFNAME=ib0"}
    first = [
        Allocation("node-a", "10.0.0.1", 16, 16, "", 2 * 10**11, (gpu,), "eth0", chosen) for gpu in ("0", "1", "2")
    ]
    second = Allocation("node-b", "10.0.0.2", 4, 64, "control group", 32 * 10**9, ("GPU-4b",), "ens3")
    ranks = tuple(RankInfo(rank, 70 + rank, held) for rank, held in enumerate([*first, second]))
    assert str(GroupStarted(ranks)).splitlines() == [
        "ranks: 0 to 2 on node-a (10.0.0.1), GPUs 0 to 2, 16 CPUs, 200 GB, eth0, nccl uses NCCL_SOCKET_IFNAME=ib0, "
        "pids 70, 71, 72",
        "       3 on node-b (10.0.0.2), GPU GPU-4b, 4 CPUs (of 64, by its control group), 32 GB, ens3, pid 73",
    ]


def test_one_machine_exchanges_on_no_interface() -> None:
    (line,) = str(GroupStarted(tuple(on_hosts(("1", 2), memory_bytes=4 * 10**9, interface="eth0")))).splitlines()
    assert line == "ranks: 0 on 1 (10.0.0.1), 2 CPUs, 4 GB, pid 7"


@pytest.mark.parametrize(
    ("changes", "free", "expected"),
    [
        ({"device": "cuda"}, 0, None),
        (
            {"device": "cuda"},
            7,
            "mesh: data 1 × layer 1 × channel 1; 7 GPUs are idle; mesh.data: 8 or mesh.channel: 8 would use them",
        ),
        (
            {"device": "cuda", "mesh": {"channel": 8}},  # 10 channels, so no 16 shards
            8,
            "mesh: data 1 × layer 1 × channel 8; 8 GPUs are idle; mesh.data: 2 would use them",
        ),
        (
            {"device": "cuda", "mesh": {"channel": 3}},
            5,
            "mesh: data 1 × layer 1 × channel 3; 5 GPUs are idle; mesh.data: 2 (6 GPUs) or mesh.channel: 8 (8 GPUs) "
            "would use more",
        ),
        (
            {"device": "cuda", "mesh": {"data": 8}},
            1,
            "mesh: data 8 × layer 1 × channel 1; 1 GPU is idle; mesh.data: 9 would use it",
        ),
        ({"device": "cuda", "mesh": {"data": 20}}, 3, None),  # a batch has no more images
        ({"device": "cpu"}, 8, "device: cpu leaves 8 GPUs idle; device: cuda gives one to every rank"),
    ],
)
def test_idle_gpus_are_told_with_the_mesh_that_uses_them(
    digits_config: Callable[..., RunConfig], changes: dict[str, Any], free: int, expected: str | None
) -> None:
    assert idle_gpus(digits_config(**changes), free) == expected
