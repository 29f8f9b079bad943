"""Ranks as processes that stay alive and sleep between requests: several groups can take turns on one machine.

A process is started once, possibly by a command that runs it elsewhere (`ip netns exec NAME`), meets the other
ranks of its group by `cluster.collectives`, and then runs one program after another:

    program(member, *arguments) → answer

Between requests it is blocked on a pipe and uses no CPU. Programs are functions of a module that both sides import. A
process whose pipe is closed exits, so none outlives the one that started it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cluster.collectives import connect_store, join_group, open_store
from cluster.connections import join_mesh
from cluster.mesh import MeshConfig
from cluster.network import LOOPBACK, interface_of
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh

EXIT_S = 5.0
"""How long a process may take to exit once its pipe is closed; then it is killed."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Host:
    """Where one rank runs.

    Attributes
    ----------
    command: what stands before the interpreter, such as ('ip', 'netns', 'exec', NAME); empty for this machine.
    address: its own IPv4 address, at which the others reach it.
    """

    command: tuple[str, ...] = ()
    address: str = LOOPBACK


@dataclass(frozen=True)
class ProcessStart:
    """The first message to a process: its rank, the group's mesh, its threads, the longest wait for another rank."""

    rank: int
    mesh: MeshConfig
    threads: int
    address: str
    timeout_s: float


@dataclass
class Member:
    """A rank as its programs see it: the ways to the others, and what programs keep for the next one."""

    mesh: Mesh
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def exchange(self) -> Exchange:
        """Connects all ranks."""
        return self.mesh.everyone


@dataclass(frozen=True)
class Raised:
    """An exception of a program, as text: its class may not exist on the other side."""

    text: str
    trace: str


class RankFailed(RuntimeError):
    """A process of a group raised, died or did not answer in time; the message names the rank."""


class RankGroup:
    """Processes that run the same programs side by side. A context manager: none is left afterwards.

    Parameters
    ----------
    hosts: one per rank; a single one needs no rendezvous.
    threads: torch threads of each.
    timeout_s: longest wait of a rank for another, and of the caller for the processes to start.
    mesh: of the ranks; None: all are shards of one replica and stage.

    Examples
    --------
    >>> with RankGroup([Host(), Host()], threads=1) as group:  # doctest: +SKIP
    ...     group.ask(program, 3)  # [answer of rank 0, answer of rank 1]
    """

    def __init__(
        self, hosts: Sequence[Host], *, threads: int, timeout_s: float = 120.0, mesh: MeshConfig | None = None
    ) -> None:
        self.hosts, self.threads, self.timeout_s = tuple(hosts), threads, timeout_s
        self.mesh = mesh or MeshConfig(channel=max(1, len(self.hosts)))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankGroup:
        try:
            self._start()
        except BaseException:  # KeyboardInterrupt too: nothing else would end them
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end(EXIT_S if kind is None else 0.0)

    def ask(self, program: Callable[..., Any], *arguments: Any, limit_s: float = 600.0) -> list[Any]:
        """Run program(member, *arguments) on every rank. Returns their answers.

        Raises
        ------
        RankFailed
            The first rank that raises or dies, or those that do not answer in `limit_s`.
        """
        message = pickle.dumps((program, arguments))
        for rank in range(len(self._pipes)):
            self._send(rank, message)
        return self._collect(range(len(self._pipes)), limit_s)

    def _start(self) -> None:
        for rank, host in enumerate(self.hosts):
            ours, theirs = Pipe()
            self._pipes.append(ours)
            with theirs:
                self.processes.append(_launch(host, theirs.fileno(), self.threads))
            seat = ProcessStart(rank, self.mesh, self.threads, host.address, self.timeout_s)
            self._send(rank, pickle.dumps(seat))
        if len(self.hosts) > 1:
            (port,) = self._collect(range(1), self.timeout_s)
            for rank in range(1, len(self.hosts)):
                self._send(rank, pickle.dumps((self.hosts[0].address, port)))
        self._collect(range(len(self._pipes)), self.timeout_s)

    def _send(self, rank: int, message: bytes) -> None:
        try:
            self._pipes[rank].send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):
            self._collect([rank], EXIT_S)  # raises its last message, or that it sent none
            raise RankFailed(self._of(rank, "has ended")) from None

    def _collect(self, ranks: Sequence[int], limit_s: float) -> list[Any]:
        """One message of each of these ranks."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < len(ranks):
            missing = {self._pipes[rank]: rank for rank in ranks if rank not in answers}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = min(missing.values())
                raise RankFailed(self._of(late, f"did not answer within {limit_s:g} s"))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = missing[pipe]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    raise RankFailed(self._of(rank, "ended without an answer")) from None
                if isinstance(answers[rank], Raised):
                    raise RankFailed(self._of(rank, answers[rank].text)) from RuntimeError(answers[rank].trace)
        return [answers[rank] for rank in ranks]

    def _of(self, rank: int, what: str) -> str:
        return f"rank {rank} of {len(self.hosts)} {what}"

    def _end(self, patience_s: float) -> None:
        """Close the pipes, at which idle processes exit; kill those that have not exited in so long."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + patience_s
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.returncode is None:
                process.kill()
                process.wait()
        self._pipes.clear()


def _launch(host: Host, pipe: int, threads: int) -> subprocess.Popen[bytes]:
    """A process that serves on a pipe's descriptor, in its own session: Ctrl-C reaches only the caller."""
    environment = environment_of(threads)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warning about a host without a name server
    program = f"from jobs.benchmarks.processes import serve; serve({pipe})"
    return subprocess.Popen(
        [*host.command, sys.executable, "-c", program],
        pass_fds=(pipe,),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,  # rows go to stdout alone
        start_new_session=True,
    )


def environment_of(threads: int) -> dict[str, str]:
    """For a process of this program with so many threads."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONPATH": path}


def _has_descriptor(stream: Any) -> bool:
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):
        return False


# -- in the process ----------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Run a rank: join the group, then answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(descriptor)
    try:
        member = _meet(pipe)
        pipe.send_bytes(pickle.dumps(None))
        with torch.no_grad():
            while True:
                program, arguments = pickle.loads(pipe.recv_bytes())
                pipe.send_bytes(pickle.dumps(program(member, *arguments)))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    except Exception as error:
        with suppress(OSError):
            lines = str(error).splitlines() or [""]
            pipe.send_bytes(pickle.dumps(Raised(f"raised {type(error).__name__}: {lines[0]}", traceback.format_exc())))
    os._exit(0)  # no cleanup of the process group: its destructors may wait for ranks that are gone


def _meet(pipe: Connection) -> Member:
    seat: ProcessStart = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(seat.threads)
    world_size, cpu = seat.mesh.world_size, torch.device("cpu")
    if world_size == 1:
        return Member(Mesh())
    name, own = interface_of(None, seat.address)
    os.environ["GLOO_SOCKET_IFNAME"] = name  # read by gloo when the group is made: there is no argument for it
    if seat.rank == 0:
        store, port = open_store(own, seat.timeout_s)
        pipe.send_bytes(pickle.dumps(port))
    else:
        address, port = pickle.loads(pipe.recv_bytes())
        store = connect_store(address, port, seat.timeout_s)
    everyone = join_group(store, 0, seat.rank, world_size, cpu, seat.timeout_s)
    return Member(join_mesh(everyone, seat.mesh, cpu, link_timeout_s=seat.timeout_s))
