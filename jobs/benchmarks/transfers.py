"""What the link between two processes carries: a plain TCP transfer, and the shortest exchange."""

from __future__ import annotations

import socket
import time

import torch

from jobs.benchmarks.processes import Group, Member


def measure(group: Group, num_bytes: int, *, repeats: int = 20) -> tuple[list[float], float]:
    """What the link under a group of two carries.

    Returns
    -------
    Bits per second of a plain TCP transfer of so many bytes, from rank 0 and from rank 1; and the seconds of an
    exchange of one value, the least of `repeats`.
    """
    addresses = [host.address for host in group.hosts]
    rates = []
    for sender in range(2):
        found = group.ask(transfer, sender, addresses[1 - sender], num_bytes)
        rates.append(next(rate for rate in found if rate is not None))
    return rates, max(group.ask(touch, repeats))


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


def touch(member: Member, repeats: int) -> float:
    """Seconds of an exchange of one value."""
    value = torch.zeros(member.exchange.world_size, 1)
    return min(_timed(member, value) for _ in range(repeats))


def _timed(member: Member, value: torch.Tensor) -> float:
    start = time.perf_counter()
    member.exchange.all_gather(value).wait()
    return time.perf_counter() - start
