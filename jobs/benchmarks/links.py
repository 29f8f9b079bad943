"""A link between two hosts on one machine (`jobs.benchmarks.namespaces`) whose rate can be limited.

Each host sends through a token bucket (`tc … tbf`), so both directions are limited on their own, as on a real link.
What the link carries is measured by a plain TCP transfer, and by the shortest exchange.
"""

from __future__ import annotations

import socket
import time

import torch

from jobs.benchmarks.namespaces import INTERFACE, Namespaces, run_tool
from jobs.benchmarks.processes import Member, RankGroup

BURST_S, LEAST_BURST = 1e-3, 16 * 1024
"""What may pass at once after a pause: what the link carries in so many seconds, at least so many bytes. Less, and the
kernel's timers keep the link below its rate; more, and short exchanges would pass as if there were no limit."""

QUEUE_MS = 100
"""Longest stay of a packet in the bucket's queue; what would wait longer is dropped."""


class Link(Namespaces):
    """Two hosts and the link between them.

    Attributes
    ----------
    hosts: where the ranks of a `RankGroup` run.
    """

    def __init__(self) -> None:
        super().__init__(("host-a", "host-b"))
        self._limited = False

    def limit(self, bits_per_s: float | None, *, delay_ms: float = 0.0) -> None:
        """Let each end send at most so many bits per second; None lifts the limit. The delay is one way."""
        for name in self.namespaces:
            if self._limited:
                run_tool("tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root")
            add = ("tc", "-n", name, "qdisc", "add", "dev", INTERFACE)
            parent = ["root"]
            if bits_per_s is not None:
                burst = max(LEAST_BURST, int(bits_per_s / 8 * BURST_S))
                rate = ("rate", f"{bits_per_s:.0f}bit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms")
                run_tool(*add, *parent, "handle", "1:", "tbf", *rate)
                parent = ["parent", "1:"]
            if delay_ms > 0:
                run_tool(*add, *parent, "handle", "2:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")
        self._limited = bits_per_s is not None or delay_ms > 0


# -- what the link carries ---------------------------------------------------------------------------------------------


def measure_link(group: RankGroup, num_bytes: int, *, repeats: int = 20) -> tuple[list[float], float]:
    """What the link under a group of two carries.

    Returns
    -------
    Bits per second of a plain TCP transfer of so many bytes, from rank 0 and from rank 1; and the seconds of an
    exchange of one value, the least of `repeats`.
    """
    addresses = [host.address for host in group.hosts]
    rates = []
    for sender in range(2):
        answers = group.ask(transfer, sender, addresses[1 - sender], num_bytes)
        rates.append(next(rate for rate in answers if rate is not None))
    return rates, max(group.ask(exchange_seconds, repeats))


def transfer(member: Member, sender: int, address: str, num_bytes: int) -> float | None:
    """One rank sends, the other listens at its address and returns the bits per second that came."""
    port = torch.zeros(2, 1, dtype=torch.int64)
    if member.exchange.rank == sender:
        member.exchange.all_gather(port).wait()
        with socket.create_connection((address, int(port[1 - sender]))) as connection:
            connection.sendall(memoryview(bytearray(num_bytes)))
            connection.recv(1)  # stays until all has come
        return None
    with socket.create_server((address, 0)) as listener:
        port[member.exchange.rank] = listener.getsockname()[1]
        member.exchange.all_gather(port).wait()
        connection, _ = listener.accept()
        with connection:
            return _receive(connection, num_bytes)


def _receive(connection: socket.socket, num_bytes: int) -> float:
    """Bits per second from the first byte on; what came with it is not counted."""
    buffer = bytearray(1 << 18)
    first = got = connection.recv_into(buffer)
    start = time.perf_counter()
    while got < num_bytes:
        came = connection.recv_into(buffer)
        if came == 0:
            raise ConnectionError(f"expected {num_bytes} bytes, got {got}")
        got += came
    return (got - first) * 8 / (time.perf_counter() - start)


def exchange_seconds(member: Member, repeats: int) -> float:
    """Seconds of an exchange of one value."""
    value = torch.zeros(member.exchange.world_size, 1)
    return min(_timed(member, value) for _ in range(repeats))


def _timed(member: Member, value: torch.Tensor) -> float:
    start = time.perf_counter()
    member.exchange.all_gather(value).wait()
    return time.perf_counter() - start
