"""Several hosts on one machine: network namespaces, joined by a bridge in a namespace of its own.

    host 0  link0 198.18.0.1 ══ veth pair ══╗
    host 1  link0 198.18.0.2 ══ veth pair ══╬══ bridge
    host 2  link0 198.18.0.3 ══ veth pair ══╝

Each host has its own interfaces, ports and host name; disk and processors are shared. Needs root, iproute2 and
util-linux. Nothing is made outside of the namespaces, and removing them removes everything. As a command it makes hosts
for another:

    python -m jobs.benchmarks.namespaces head worker -- COMMAND

`COMMAND` finds `NAME ADDRESS NAMESPACE` of each host, a line each, in the variable `SIMMATCH_HOSTS`. What still runs on
the hosts when it has ended, is ended with them. Exit status: that of `COMMAND`; 3 where there can be no hosts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

from jobs.benchmarks.processes import Host
from jobs.reporting import MissingError

INTERFACE = "link0"
"""Name of each host's end, in its own namespace."""

NETWORK, PREFIX_BITS = "198.18.0", 24
"""Of the range that RFC 2544 sets aside for benchmarks."""

COMMAND_TIMEOUT_S = 20.0

NAMESPACES = Path("/run/netns")
"""Where `ip netns` keeps them."""

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
"""Command → Debian's package of it."""

HOSTS = "SIMMATCH_HOSTS"
NO_HOSTS = 3
END_S = 10.0
"""How long processes of hosts that are being removed may take to end."""

ENTER = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')
"""Gives a command the host name that follows, for itself alone."""


class Namespaces:
    """Hosts on this machine. A context manager: all are always removed at the end.

    Parameters
    ----------
    names: host names, one per host.

    Attributes
    ----------
    namespaces: names of the hosts' network namespaces, unique on this machine.
    hosts: how to run a command on each, and its address.

    Raises
    ------
    MissingError
        On entry: not root, a tool is missing, or a machine that does not allow namespaces.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unique = f"simmatch-{os.getpid()}-{secrets.token_hex(3)}"
        self.namespaces = tuple(f"{unique}-{number}" for number in range(len(names)))
        self._bridge = f"{unique}-bridge"
        self.hosts = [
            Host(("ip", "netns", "exec", namespace, *ENTER, name), f"{NETWORK}.{number + 1}")
            for number, (namespace, name) in enumerate(zip(self.namespaces, names, strict=True))
        ]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for tool, package in TOOLS.items():
            if shutil.which(tool) is None:
                raise MissingError(f"network: expected the command {tool}, which Debian's package {package} has")
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

    def end_processes(self) -> None:
        """End whatever runs on the hosts: SIGTERM, then SIGKILL."""
        for send in (psutil.Process.terminate, psutil.Process.kill):
            deadline = time.monotonic() + END_S
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):
                    send(process)
            while self._processes():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            else:
                return

    def _processes(self) -> list[psutil.Process]:
        """Every process on a host."""
        pids = [pid for name in self.namespaces for pid in run_tool("ip", "netns", "pids", name).split()]
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def _make(self) -> None:
        for name in (self._bridge, *self.namespaces):
            self._stack.callback(_remove, name)  # before it exists: an interruption may come in between
            run_tool("ip", "netns", "add", name)
        run_tool("ip", "-n", self._bridge, "link", "add", "bridge0", "up", "type", "bridge")
        for number, (name, host) in enumerate(zip(self.namespaces, self.hosts, strict=True)):
            pair = ("type", "veth", "peer", "name", f"port{number}", "netns", self._bridge)
            run_tool("ip", "-n", name, "link", "add", INTERFACE, *pair)
            run_tool("ip", "-n", self._bridge, "link", "set", f"port{number}", "up", "master", "bridge0")
            run_tool("ip", "-n", name, "address", "add", f"{host.address}/{PREFIX_BITS}", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                run_tool("ip", "-n", name, "link", "set", interface, "up")


def run_tool(*words: str) -> str:
    """Run a tool of iproute2, in its own session, so that Ctrl-C does not interrupt it. Returns its output."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"network: `{' '.join(words)}` cannot run here: {error}") from None
    if done.returncode != 0:
        raise MissingError(f"network: `{' '.join(words)}` is not possible here: {done.stderr.strip() or 'no reason'}")
    return done.stdout


def _remove(name: str) -> None:
    if (NAMESPACES / name).exists():
        run_tool("ip", "netns", "del", name)


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


def main(arguments: list[str]) -> int:
    """Make the hosts, run the command, end what it left running. Returns the exit status."""
    if "--" not in arguments or not (names := arguments[: (split := arguments.index("--"))]):
        print("usage: python -m jobs.benchmarks.namespaces NAME [NAME ...] -- COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        with exits_on_sigterm(), Namespaces(names) as network, ExitStack() as stack:
            stack.callback(network.end_processes)
            lines = [
                f"{name} {host.address} {namespace}"
                for name, host, namespace in zip(names, network.hosts, network.namespaces, strict=True)
            ]
            command = subprocess.Popen(arguments[split + 1 :], env=os.environ | {HOSTS: "\n".join(lines)})
            stack.callback(_end, command)
            return command.wait()
    except MissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_HOSTS
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _end(command: subprocess.Popen[bytes]) -> None:
    """Of a command that was interrupted: time to remove what it made."""
    command.terminate()
    try:
        command.wait(END_S)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
