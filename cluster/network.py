"""Which network interface the exchanges use, loopback unless ranks sit on several machines or the user names one; and
whether the head of Ray's cluster is there."""

from __future__ import annotations

import os
import socket
import time

import psutil

LOOPBACK = "127.0.0.1"


def interface_of(name: str | None, address: str) -> tuple[str, str]:
    """Name and IPv4 address of the interface `name`, or where that is None of the one that has `address`.

    Of several addresses of the interface `name` it is `address`, or the first where that is not among them.

    Raises
    ------
    ValueError
        No such interface here, or none with an IPv4 address.
    """
    found = [
        (interface, entry.address)
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    fitting = [place for place in found if (place[1] == address if name is None else place[0] == name)]
    if fitting:
        return min(fitting, key=lambda place: place[1] != address)
    wanted = f"an interface with address {address}" if name is None else f"the interface {name}"
    known = ", ".join(f"{interface} ({own})" for interface, own in sorted(found))
    raise ValueError(f"cluster.interface: expected {wanted} on {socket.gethostname()}, found {known}")


def use_interface(name: str) -> None:
    """What gloo and nccl read when a group is made: there is no argument for it.

    What an administrator has set stays. Of several addresses both take the interface's first.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign eth1 would mean eth10 too


class Head:
    """The head of Ray's cluster, watched by its port.

    Without it a driver cannot go on: every question to it waits, and Ray ends the process, without a word to its
    caller, after RAY_gcs_rpc_server_reconnect_timeout_s (60 s). So it is noticed here before.

    Parameters
    ----------
    address: host:port of its control service.
    limit_s: longest silence.
    """

    ASK_EVERY_S = 1.0
    """Pause between two questions, and the longest that one may take."""

    def __init__(self, address: str, limit_s: float) -> None:
        self.address, self.limit_s = address, limit_s
        self._asked = self._answered = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since it last took a connection; 0 while it does, and while it need not be asked again yet."""
        now = time.monotonic()
        if now - self._asked >= self.ASK_EVERY_S or self._asked > self._answered:
            self._asked = now
            if takes_connections(self.address, self.ASK_EVERY_S):
                self._answered = now
        return max(0.0, self._asked - self._answered)

    @property
    def lost(self) -> bool:
        """Whether it has been silent for longer than the limit. Asks it, where that is due."""
        return self.silent_s() > self.limit_s


def takes_connections(address: str, timeout_s: float) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True
