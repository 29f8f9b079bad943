"""Groups and links along every axis, over gloo between real processes: who meets whom, what comes, and who is late."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.collectives import PeerTimeout, TorchExchange
from cluster.connections import Traffic, join_mesh
from cluster.failures import stalled
from cluster.mesh import MeshConfig
from cluster.messages import RankStatus
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import gather_from_ranks
from tests.exchanges import results

CPU = torch.device("cpu")
SHAPES = [((17, 3), torch.float32), ((8,), torch.bfloat16), ((0, 4), torch.float32), ((3, 2, 2), torch.float64)]
AHEAD = 3
"""Tensors that a stage sends before it waits for the first."""


def mesh_of(exchange: TorchExchange, **extents: int) -> Mesh:
    return join_mesh(exchange, MeshConfig(**extents), CPU, link_timeout_s=exchange.timeout_s)


# -- who meets whom ----------------------------------------------------------------------------------------------------


def members(exchange: TorchExchange, extents: dict[str, int]) -> dict[str, Any]:
    """The ranks that this one meets along each axis, in the order of that axis."""
    mesh = mesh_of(exchange, **extents)
    own = torch.tensor([float(exchange.rank)])

    def met(axis: Exchange) -> list[int]:
        return [int(rank) for rank in gather_from_ranks(own, axis)] if axis is not IDENTITY else [exchange.rank]

    below = torch.tensor([-1.0])
    handles = [link.send(own) for link in [mesh.above] if link] + [link.receive(below) for link in [mesh.below] if link]
    for handle in handles:
        handle.wait()
    axes = {axis: met(getattr(mesh, axis)) for axis in ("everyone", "owners", "replicas", "columns")}
    connections = [each.name for each in Traffic(mesh).connections]
    return axes | {"stage": (mesh.stage, mesh.stages), "below": int(below), "names": connections}


@pytest.mark.parametrize(
    "extents",
    [{"channel": 3}, {"data": 2, "channel": 2}, {"layer": 2, "channel": 2}, {"data": 2, "layer": 2}, {"layer": 3}],
    ids=str,
)
def test_every_rank_meets_those_of_its_axes(ranks: Any, extents: dict[str, int]) -> None:
    config = MeshConfig(**extents)
    found = results(ranks(members, config.world_size, extents))
    for rank, met in enumerate(found):
        at = config.place(rank)
        assert met["everyone"] == list(range(config.world_size))
        assert met["owners"] == list(config.ranks(replica=at.replica, stage=at.stage))
        assert met["replicas"] == list(config.ranks(stage=at.stage, owner=at.owner))
        assert met["columns"] == list(config.ranks(stage=at.stage))
        assert met["stage"] == (at.stage, config.layer)
        assert met["below"] == (config.rank(replace(at, stage=at.stage - 1)) if at.stage > 0 else -1)
        assert len(met["names"]) == len(set(met["names"]))  # told apart by name


def test_shards_alone_use_a_single_group(ranks: Any) -> None:
    for met in results(ranks(members, 2, {"channel": 2})):
        assert met["names"] == [""]


# -- links -------------------------------------------------------------------------------------------------------------


def values(number: int, stage: int) -> list[torch.Tensor]:
    return [torch.full(shape, 10 * number + stage, dtype=dtype) for shape, dtype in SHAPES]


def pass_on(exchange: TorchExchange, extents: dict[str, int], rounds: int) -> tuple[bool, int, int]:
    """Every stage receives from the one below, adds one, and sends that on, `AHEAD` tensors in flight; the last is
    slow. Returns whether what came was right, and what was counted.
    """
    mesh = mesh_of(exchange, **extents)
    right, in_flight = True, []
    for number in range(rounds):
        tensors = values(number, 0)
        if mesh.below is not None:
            tensors = [torch.full_like(tensor, -1) for tensor in tensors]
            for handle in [mesh.below.receive(tensor) for tensor in tensors]:
                handle.wait()
            expected = values(number, mesh.stage - 1)
            right &= all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))
            tensors = [tensor + 1 for tensor in tensors]
        if mesh.above is not None:
            in_flight += [(mesh.above.send(tensor), tensor) for tensor in tensors]
            while len(in_flight) > AHEAD:
                in_flight.pop(0)[0].wait()
        if mesh.stage == mesh.stages - 1:
            time.sleep(0.01)
    for handle, _ in in_flight:
        handle.wait()
    traffic = Traffic(mesh)
    return right, traffic.bytes_exchanged, traffic.num_exchanges


def test_tensors_come_through_a_pipeline_in_order(ranks: Any) -> None:
    rounds, extents = 12, {"layer": 3}
    found = results(ranks(pass_on, 3, extents, rounds))
    assert all(right for right, _, _ in found)
    moved = rounds * sum(tensor.nbytes for tensor in values(0, 0))
    assert [received for _, received, _ in found] == [0, moved, moved]
    assert [count for _, _, count in found] == [rounds * len(SHAPES)] * 2 + [0]  # counted where they come from


def exchanged(exchange: TorchExchange, extents: dict[str, int]) -> int:
    """Counted after one exchange of each connection."""
    mesh = mesh_of(exchange, **extents)
    for each in (mesh.owners, mesh.replicas, mesh.columns):
        each.all_gather(torch.zeros(each.world_size, 1)).wait()
    return Traffic(mesh).num_exchanges


def test_the_first_rank_counts_for_its_stage(ranks: Any) -> None:
    """Two pairs of owners, two pairs of replicas, and all four."""
    assert results(ranks(exchanged, 4, {"data": 2, "channel": 2}))[0] == 2 + 2 + 1


# -- who is late -------------------------------------------------------------------------------------------------------


def wait_above(exchange: TorchExchange, absent: int, how: str) -> str | None:
    """Two stages; one of them does not come to its end of the link, or is gone."""
    mesh = mesh_of(exchange, layer=2)
    if exchange.rank == absent:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5)
        return None
    tensor = torch.ones(100_000)
    try:
        link = mesh.above or mesh.below
        assert link is not None
        (link.send(tensor) if mesh.above else link.receive(tensor)).wait()
    except PeerTimeout as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("how", ["away", "kill"])
def test_a_missing_stage_is_a_timeout_that_names_the_link(ranks: Any, absent: int, how: str) -> None:
    found = ranks(wait_above, 2, absent, how, exchange_timeout_s=1.0)
    limit = r"rank \d of 2 waited for exchange 1 of the link from rank 0 to rank 1 \(limit 1 s\)"
    assert str(found[1 - absent]).startswith(limit.replace(r"\d", str(1 - absent)).replace("\\", ""))


def status(rank: int, idle_s: float, **exchanges: int) -> RankStatus:
    """Connections by one letter: `e`veryone, `p` and `q` the owners of two stages, `l` and `m` the links."""
    started = {"" if key == "e" else key: number for key, number in exchanges.items()}
    return RankStatus(rank, False, None, [], [], started, idle_s=idle_s)


@pytest.mark.parametrize(
    ("what", "statuses", "expected"),
    [
        (
            "a stage is legitimately ahead",
            [status(0, 0.1, e=2, l=9), status(1, 0.1, e=2, l=4)],
            None,
        ),
        (
            "the upper stage is stuck in its update",
            [status(0, 5.0, e=2, l=9), status(1, 7.0, e=2, l=4)],
            "rank 1 has not started exchange 5 of l (start), rank 0 waited for it",
        ),
        (
            "the lower stage is stuck",
            [status(0, 7.0, e=2, l=4), status(1, 5.0, e=2, l=5)],
            "rank 0 has not started exchange 5 of l (start), rank 1 waited for it",
        ),
        (  # rank 2 is stuck: its peer waits for it, and both ranks of the lower stage for the link
            "an owner of the upper stage is stuck",
            [
                status(0, 5.0, e=2, p=30, l=9),
                status(1, 5.0, e=2, p=30, m=9),
                status(2, 7.0, e=2, q=20, l=6),
                status(3, 6.5, e=2, q=21, m=6),
            ],
            "rank 2 has not started exchange 7 of l (start), ranks 0, 1, 3 waited for it",
        ),
        (  # rank 1 waits for 0; both stages above work on what is queued, and are not the cause
            "an owner of the lower stage is stuck while the upper stage still works",
            [
                status(0, 7.0, e=2, p=29, l=9),
                status(1, 6.0, e=2, p=30, m=9),
                status(2, 0.2, e=2, q=20, l=6),
                status(3, 0.2, e=2, q=20, m=6),
            ],
            "rank 0 has not started exchange 30 of p (start), rank 1 waited for it",
        ),
        (
            "the end: a stage is missing where all meet",
            [status(0, 5.0, e=3, l=20), status(1, 9.0, e=2, l=20), status(2, 5.0, e=3)],
            "rank 1 has not started exchange 3 (start), ranks 0, 2 waited for it",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_cause_is_told_from_those_that_wait_for_it(
    what: str, statuses: list[RankStatus], expected: str | None
) -> None:
    failure = stalled(statuses, limit_s=60.0, wait_limit_s=4.0)
    assert (failure and failure.message) == (expected and f"{expected} for 4 s"), what
