"""Bandwidth and latency between ranks, by the library that a run exchanges with: gloo, or nccl between GPUs.

First ranks connect to each other by plain TCP, which names the pairs that a firewall keeps apart. Then all join one
group, as in a run, and pairs are measured: each rank with each other where there are few, neighbours in a ring where
there are many. Pairs without a rank in common are measured at the same time, as they are used at the same time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.collectives import connect_store, join_group, open_store
from cluster.network import interface_of, use_interface
from cluster.redaction import one_line

MOST_IN_PAIRS = 8
"""Ranks up to which every pair is measured."""

ROUND_TRIPS = 20
"""Of a single value, for the latency of a pair."""

LEAST_BYTES, MOST_BYTES = 2**16, 2**26
"""Of one transfer: more and more are sent until one takes `ENOUGH_S`."""

ENOUGH_S = 0.2
REPEATS = 3
"""Of the largest transfer, where the link is so fast."""

CONNECT_S = 5.0
"""Longest wait for a plain connection."""

Pair = tuple[int, int]


def rounds_of(ranks: int) -> list[list[Pair]]:
    """Which pairs are measured, at the same time within a round.

    >>> rounds_of(4)
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    >>> rounds_of(9)[0], rounds_of(9)[-1]
    ([(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 8)])
    """
    if ranks > MOST_IN_PAIRS:
        ring = [(rank, rank + 1) for rank in range(ranks - 1)]
        return [ring[::2], ring[1::2], [(0, ranks - 1)]]
    seats = list(range(ranks + ranks % 2))  # a tournament; one more seat where one has to sit out
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < ranks))
        seats[1:] = [seats[-1], *seats[1:-1]]
    return rounds


def partners_of(rank: int, ranks: int) -> list[int]:
    """Those with whom a rank is measured."""
    return [sum(pair) - rank for pairs in rounds_of(ranks) for pair in pairs if rank in pair]


@dataclass(frozen=True)
class LinkSpeed:
    """Of one direction of a pair.

    Attributes
    ----------
    latency_s: half of the median round trip of a single value.
    """

    source: int
    target: int
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class LinkReport:
    """What a rank has measured: both directions of the pairs in which it is the first; and why it stopped early."""

    speeds: tuple[LinkSpeed, ...]
    error: str = ""


class LinkProbe:
    """A rank of the measurement, made into an actor.

    Parameters
    ----------
    rank, ranks: its number, and how many there are.
    device: `cpu` or `cuda`, which decides the library.
    limit_s: longest wait for another rank.
    """

    def __init__(self, rank: int, ranks: int, device: str, limit_s: float) -> None:
        self.rank, self.ranks, self.device, self.limit_s = rank, ranks, torch.device(device), limit_s
        self._store: Any = None
        self._listener: socket.socket | None = None

    def listen(self, interface: str | None, address: str) -> tuple[str, int]:
        """Accept plain connections on the interface of the exchanges. Returns its address, and the port."""
        name, own = interface_of(interface, address)
        use_interface(name)
        self._listener = socket.create_server((own, 0), backlog=128)
        return own, int(self._listener.getsockname()[1])

    def reach(self, places: Sequence[tuple[str, int]]) -> dict[int, str]:
        """Connect to every partner. Returns why not, for those that cannot be reached."""
        errors = {}
        for partner in partners_of(self.rank, self.ranks):
            try:
                socket.create_connection(places[partner], timeout=CONNECT_S).close()
            except OSError as error:
                errors[partner] = error.strerror or str(error)
        return errors

    def bind(self, address: str) -> tuple[str, int]:
        """Rank 0: the store of the rendezvous."""
        self._store, port = open_store(address, self.limit_s)
        return address, port

    def measure(self, store: tuple[str, int]) -> LinkReport:
        """Join the others, and measure in all rounds."""
        if self._listener is not None:
            self._listener.close()
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_device(0)
        speeds: list[LinkSpeed] = []
        partner: int | None = None
        try:
            connected = self._store or connect_store(*store, self.limit_s)
            group = join_group(connected, 0, self.rank, self.ranks, self.device, self.limit_s).group
            for pairs in rounds_of(self.ranks):
                partner = next((sum(pair) - self.rank for pair in pairs if self.rank in pair), None)
                if partner is not None:
                    speeds += measure_pair(group, self.rank, partner, self.device)
        except Exception as error:  # whatever torch, gloo and nccl make of a network
            where = "joining the others" if partner is None else f"with rank {partner}"
            return LinkReport(tuple(speeds), f"{where}: {one_line(error)}")
        return LinkReport(tuple(speeds))


def measure_pair(group: dist.ProcessGroup, rank: int, partner: int, device: torch.device) -> list[LinkSpeed]:
    """Both directions; called by both ranks at the same time. The first of them returns what it has measured."""
    first = rank < partner
    latency_s = _round_trip_s(group, partner, device, first=first) / 2
    there = _rate(group, partner, device, sends=first)
    back = _rate(group, partner, device, sends=not first)
    # who sends measures: the second rank hands its figure over
    measured = torch.tensor([back], dtype=torch.float64, device=device)
    if not first:
        dist.send(measured, group=group, group_dst=partner)
        return []
    dist.recv(measured, group=group, group_src=partner)
    return [LinkSpeed(rank, partner, there, latency_s), LinkSpeed(partner, rank, float(measured), latency_s)]


def _round_trip_s(group: dist.ProcessGroup, partner: int, device: torch.device, *, first: bool) -> float:
    value = torch.zeros(1, device=device)
    seconds = []
    for _ in range(ROUND_TRIPS + 1):
        start = time.perf_counter()
        if first:
            dist.send(value, group=group, group_dst=partner)
        dist.recv(value, group=group, group_src=partner)
        value.item()  # nccl only queues
        if not first:
            dist.send(value, group=group, group_dst=partner)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])  # the first makes the connection


def _rate(group: dist.ProcessGroup, partner: int, device: torch.device, *, sends: bool) -> float:
    """Bytes per second of the largest transfer, as the sender sees them; of the receiver nothing."""
    size = torch.tensor([LEAST_BYTES], device=device)
    answer = torch.zeros(1, device=device)
    content = torch.zeros(0, dtype=torch.uint8, device=device)
    rate, repeats = 0.0, 0
    while True:
        if sends:
            dist.send(size, group=group, group_dst=partner)
        else:
            dist.recv(size, group=group, group_src=partner)
        num_bytes = int(size)
        if num_bytes == 0:
            return rate
        if len(content) < num_bytes:
            content = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        seconds = _transfer_s(group, partner, content[:num_bytes], answer, sends=sends)
        if not sends:
            continue
        rate = max(rate, num_bytes / seconds) if num_bytes == MOST_BYTES else num_bytes / seconds
        repeats += num_bytes == MOST_BYTES
        if seconds >= ENOUGH_S or repeats == REPEATS:
            size.zero_()
        else:
            size.fill_(min(MOST_BYTES, num_bytes * (2 if seconds > ENOUGH_S / 4 else 4)))


def _transfer_s(group: dist.ProcessGroup, partner: int, content: Tensor, answer: Tensor, *, sends: bool) -> float:
    start = time.perf_counter()
    if sends:
        dist.send(content, group=group, group_dst=partner)
        dist.recv(answer, group=group, group_src=partner)  # when all has come
        answer.item()
    else:
        dist.recv(content, group=group, group_src=partner)
        content[-1:].cpu()
        dist.send(answer, group=group, group_dst=partner)
    return time.perf_counter() - start
