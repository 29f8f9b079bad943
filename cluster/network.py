"""Which network interface the exchanges use: loopback unless ranks sit on several machines or the user names one."""

from __future__ import annotations

import socket

import psutil

LOOPBACK = "127.0.0.1"


def interface_of(name: str | None, address: str) -> tuple[str, str]:
    """Name and IPv4 address of the interface `name`, or where that is None of the one that has `address`.

    Raises
    ------
    ValueError
        No such interface here, or none with an IPv4 address.
    """
    found = {
        interface: entry.address
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    for interface, own in found.items():
        if interface == name or (name is None and own == address):
            return interface, own
    wanted = f"an interface with address {address}" if name is None else f"the interface {name}"
    known = ", ".join(f"{interface} ({own})" for interface, own in sorted(found.items()))
    raise ValueError(f"cluster.interface: expected {wanted} on {socket.gethostname()}, found {known}")
