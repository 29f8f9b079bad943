"""Which network interface the exchanges use: loopback unless ranks run on several machines or the user names one; and
whether the head of Ray's cluster answers."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"


def interface_of(name: str | None, address: str) -> tuple[str, str]:
    """Name and IPv4 address of the interface `name`, or, where that is None, of the one that has `address`.

    Where the interface has several addresses, `address` is returned if it is among them, else the first.

    Raises
    ------
    ValueError
        No such interface here, or none with an IPv4 address.
    """
    interfaces = [
        (interface, entry.address)
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    fitting = [(own, at) for own, at in interfaces if (at == address if name is None else own == name)]
    if fitting:
        return min(fitting, key=lambda pair: pair[1] != address)
    wanted = f"an interface with address {address}" if name is None else f"the interface {name}"
    known = ", ".join(f"{interface} ({own})" for interface, own in sorted(interfaces))
    raise ValueError(f"cluster.interface: expected {wanted} on {socket.gethostname()}, got {known}")


VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
"""What each library reads when a group is made: there is no argument for it."""

NCCL_FILES = (Path("~/.nccl.conf"), Path("/etc/nccl.conf"))
"""Where nccl reads variables that the environment does not set; NCCL_CONF_FILE names another first file."""


def use_interface(name: str) -> None:
    """Have gloo and nccl use this interface, where an administrator has not chosen one for them.

    gloo takes a list of names; nccl takes prefixes, unless a sign stands before them: eth1 would mean eth10 too. Both
    libraries take the interface's first address.
    """
    chosen = administrators()
    for library, value in (("gloo", name), ("nccl", f"={name}")):
        if library not in chosen:
            os.environ[VARIABLES[library]] = value


def administrators() -> dict[str, str]:
    """Library → the interface that an administrator has chosen for it on this node, and where.

    Such as `{"nccl": "NCCL_SOCKET_IFNAME=^docker0 in /etc/nccl.conf"}`.
    """
    chosen = {library: f"{name}={os.environ[name]}" for library, name in VARIABLES.items() if os.environ.get(name)}
    if "nccl" not in chosen:  # its files give way to the environment, which we would set
        first = os.environ.get("NCCL_CONF_FILE")
        for path in (Path(first) if first else NCCL_FILES[0], *NCCL_FILES[1:]):
            value = _in_file(path.expanduser(), VARIABLES["nccl"])
            if value is not None:
                return chosen | {"nccl": f"{VARIABLES['nccl']}={value} in {path}"}
    return chosen


def _in_file(path: Path, variable: str) -> str | None:
    """The value that a file of nccl's gives to a variable, in lines NAME=value; None without one."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    values = [value for name, sign, value in (line.partition("=") for line in lines) if sign and name == variable]
    return values[0] if values else None  # nccl sets what is not set yet


class RayHead:
    """Whether the head of Ray's cluster accepts connections.

    A driver cannot continue without it: every call to it waits, and Ray ends the process, without an exception, after
    RAY_gcs_rpc_server_reconnect_timeout_s (60 s). This notices it earlier.

    Parameters
    ----------
    address: host:port of its control service.
    limit_s: longest silence.
    """

    ASK_EVERY_S = 1.0
    """Pause between two attempts, and the longest that one may take."""

    def __init__(self, address: str, limit_s: float) -> None:
        self.address, self.limit_s = address, limit_s
        self._asked = self._answered = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since it last accepted a connection; 0 while it does, and until the next attempt is due."""
        now = time.monotonic()
        if now - self._asked >= self.ASK_EVERY_S or self._asked > self._answered:
            self._asked = now
            if accepts_connections(self.address, self.ASK_EVERY_S):
                self._answered = now
        return max(0.0, self._asked - self._answered)

    @property
    def lost(self) -> bool:
        """Whether it has been silent for longer than the limit. Makes an attempt if one is due."""
        return self.silent_s() > self.limit_s


def accepts_connections(address: str, timeout_s: float) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True
