"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces whose rate can be limited.

    namespace A  link0 198.18.0.1 ══ veth pair ══ 198.18.0.2 link0  namespace B

Each end sends through a token bucket (`tc … tbf`), so both directions are limited on their own, as on a real link.
Needs root and Debian's package iproute2. Nothing is ever made outside of the two namespaces, and removing them removes
everything. What the link carries is measured by a plain TCP transfer, and by the shortest exchange.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch

from jobs.benchmarks.processes import Host, Member, RankGroup
from jobs.reporting import MissingError

INTERFACE = "link0"
"""Name of both ends, each in its own namespace."""

ADDRESSES = ("198.18.0.1", "198.18.0.2")
"""Of the range that RFC 2544 sets aside for benchmarks."""

BURST_S, LEAST_BURST = 1e-3, 16 * 1024
"""What may pass at once after a pause: what the link carries in so many seconds, at least so many bytes. Less, and the
kernel's timers keep the link below its rate; more, and short exchanges would pass as if there were no limit."""

QUEUE_MS = 100
"""Longest stay of a packet in the bucket's queue; what would wait longer is dropped."""

COMMAND_TIMEOUT_S = 20.0

NAMESPACES = Path("/run/netns")
"""Where `ip netns` keeps them."""


class Link:
    """The two namespaces and their link. A context manager: both are always removed at the end.

    Attributes
    ----------
    namespaces: their names, unique on this machine.
    hosts: where the ranks of a `RankGroup` run.

    Raises
    ------
    MissingError
        On entry: not root, no iproute2, or a machine that does not allow namespaces.
    """

    def __init__(self) -> None:
        unique = f"simmatch-{os.getpid()}-{secrets.token_hex(3)}"
        self.namespaces = (f"{unique}-a", f"{unique}-b")
        self.hosts = [
            Host(("ip", "netns", "exec", name), address)
            for name, address in zip(self.namespaces, ADDRESSES, strict=True)
        ]
        self._limited = False
        self._stack = ExitStack()

    def __enter__(self) -> Link:
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise MissingError(f"network: expected the command {tool}, which Debian's package iproute2 has")
        if os.geteuid() != 0:
            raise MissingError("network: expected to run as root, which making network namespaces needs")
        try:
            self._make()
        except BaseException:  # an interruption included
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def limit(self, bits_per_s: float | None, *, delay_ms: float = 0.0) -> None:
        """Let each end send at most so many bits per second; None lifts the limit. The delay is one way."""
        for name in self.namespaces:
            if self._limited:
                _command("tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root")
            add = ("tc", "-n", name, "qdisc", "add", "dev", INTERFACE)
            parent = ["root"]
            if bits_per_s is not None:
                burst = max(LEAST_BURST, int(bits_per_s / 8 * BURST_S))
                rate = ("rate", f"{bits_per_s:.0f}bit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms")
                _command(*add, *parent, "handle", "1:", "tbf", *rate)
                parent = ["parent", "1:"]
            if delay_ms > 0:
                _command(*add, *parent, "handle", "2:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")
        self._limited = bits_per_s is not None or delay_ms > 0

    def _make(self) -> None:
        for name in self.namespaces:
            self._stack.callback(_remove, name)  # before it exists: an interruption may come in between
            _command("ip", "netns", "add", name)
        here, there = self.namespaces
        pair = ("type", "veth", "peer", "name", INTERFACE, "netns", there)
        _command("ip", "-n", here, "link", "add", INTERFACE, *pair)
        for name, address in zip(self.namespaces, ADDRESSES, strict=True):
            _command("ip", "-n", name, "address", "add", f"{address}/30", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _command("ip", "-n", name, "link", "set", interface, "up")


def _command(*words: str) -> None:
    """Run a tool of iproute2, in its own session, so that Ctrl-C does not interrupt it."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"network: `{' '.join(words)}` cannot run here: {error}") from None
    if done.returncode != 0:
        raise MissingError(f"network: `{' '.join(words)}` is not possible here: {done.stderr.strip() or 'no reason'}")


def _remove(name: str) -> None:
    if (NAMESPACES / name).exists():
        _command("ip", "netns", "del", name)


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this block as an exception, so that what it made is removed: by default it would be left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
