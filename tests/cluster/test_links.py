"""Bandwidth and latency between ranks, as the doctor measures them: every pair once, and a limited link."""

from __future__ import annotations

import itertools
import socket
from contextlib import closing
from typing import Any

import pytest
import torch

from jobs.benchmarks.links import Link
from jobs.benchmarks.processes import Member, RankGroup
from jobs.diagnosis.links import LinkProbe, LinkSpeed, measure_pair, partners_of, rounds_of
from jobs.reporting import MissingError

TOLERANCE = (0.80, 1.0)
"""Content that arrives over the rate of the link. A frame of 1514 bytes holds 1448 of content; the bucket lets a burst
pass at once, 1 ms of a transfer of 100 ms or more: 0.94 to 0.98. Processors that are busy with other work delay the
receiver's answer, which lowers the figure."""


@pytest.mark.parametrize("ranks", range(1, 13))
def test_every_pair_or_a_ring_and_nobody_twice_in_a_round(ranks: int) -> None:
    rounds = rounds_of(ranks)
    for pairs in rounds:
        seats = list(itertools.chain(*pairs))
        assert len(set(seats)) == len(seats)
    measured = sorted(itertools.chain(*rounds))
    if ranks <= 8:
        assert measured == sorted(itertools.combinations(range(ranks), 2))
    else:
        ring = {(min(pair), max(pair)) for pair in ((rank, (rank + 1) % ranks) for rank in range(ranks))}
        assert measured == sorted(ring)
    for rank in range(ranks):
        assert sorted(partners_of(rank, ranks)) == sorted(sum(pair) - rank for pair in measured if rank in pair)


def measured(exchange: Any) -> list[LinkSpeed]:
    rank, cpu = exchange.rank, torch.device("cpu")
    pairs = [pair for pairs in rounds_of(exchange.world_size) for pair in pairs if rank in pair]
    return [speed for pair in pairs for speed in measure_pair(exchange.group, rank, sum(pair) - rank, cpu)]


def test_each_direction_of_every_pair_is_measured_once(ranks: Any) -> None:
    outcomes = ranks(measured, 3)
    assert all(isinstance(outcome, list) for outcome in outcomes), outcomes
    speeds = list(itertools.chain(*outcomes))
    directions = sorted((speed.source, speed.target) for speed in speeds)
    assert directions == sorted(itertools.permutations(range(3), 2))
    assert all(speed.bytes_per_s > 1e6 and 0 < speed.latency_s < 1 for speed in speeds)


def test_a_port_that_is_closed_is_named_by_its_pair() -> None:
    with closing(socket.socket()) as closed, socket.create_server(("127.0.0.1", 0)) as there:
        closed.bind(("127.0.0.1", 0))
        places = [("127.0.0.1", 1), there.getsockname(), closed.getsockname()]
        assert LinkProbe(0, 3, "cpu", 5.0).reach(places) == {2: "Connection refused"}


def on_member(member: Member) -> list[LinkSpeed]:
    return measured(member.exchange)


@pytest.mark.slow
def test_the_figure_of_a_limited_link_is_its_limit() -> None:
    try:
        with Link() as link, RankGroup(link.hosts, threads=1) as group:
            for bits_per_s in (20e6, 200e6):
                link.limit(bits_per_s)
                speeds = group.ask(on_member)[0]
                assert [(speed.source, speed.target) for speed in speeds] == [(0, 1), (1, 0)]
                for speed in speeds:
                    assert TOLERANCE[0] < 8 * speed.bytes_per_s / bits_per_s < TOLERANCE[1], (bits_per_s, speed)
    except MissingError as reason:
        pytest.skip(f"no network namespaces: {reason}")
