"""A rank, as a plain class: the controller talks to it, a thread of it trains.

Nothing here knows of Ray; `cluster.group` makes actors of it at one call site. The training thread never waits for
the controller, and the controller's calls are answered while it computes.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from cluster.collectives import PeerTimeout, connect_store, join_group, open_store
from cluster.cpus import allowed_cpus
from cluster.failures import classify
from cluster.messages import Message, Progress, Traceback
from cluster.network import interface_of, use_interface
from cluster.policy import Failure
from cluster.reach import answer
from cluster.redaction import Redactor
from cluster.training import Assignment, Stopped, Training
from simmatch.precision import exact_float32
from simmatch.sharding.exchange import IDENTITY, Exchange


@dataclass(frozen=True)
class Place:
    """Where a rank runs; `cpus` are those that its process may use, `reach` see `cluster.reach.answer`."""

    rank: int
    host: str
    address: str
    pid: int
    cpus: int
    reach: str = ""


@dataclass(frozen=True)
class Status:
    """What a rank answers to a poll.

    Attributes
    ----------
    phases: how far each phase got, those that are over included, in their order; the last is the present one.
    messages: those from number `first` on that were asked for.
    num_exchanges: exchanges started; a rank that falls behind the others is the one they wait for.
    stopped: it is done because it was asked to stop, and has written what it knows.
    idle_s: since a poll last found that its training thread had moved: started or ended an exchange, sent a message or
        reported progress. A peer that waits in an exchange is idle as well; see `stalled`.
    """

    rank: int
    done: bool
    failure: Failure | None
    phases: list[Progress]
    messages: list[Message]
    num_exchanges: int
    stopped: bool = False
    idle_s: float = 0.0

    @property
    def progress(self) -> Progress | None:
        """How far the present phase is; None before the first."""
        return self.phases[-1] if self.phases else None


def stalled(statuses: Sequence[Status], limit_s: float) -> Failure | None:
    """A loss, where a rank that is not done has not moved for longer than the limit; it names who holds up the rest.

    The ranks that have started the fewest exchanges are those that the others wait for. No exchange ends the wait for
    a rank that is alone, or for ranks that are all stuck outside of one.
    """
    idle = [status for status in statuses if not status.done and status.idle_s > limit_s]
    if not idle:
        return None
    least = min(status.num_exchanges for status in idle)
    culprits = [status for status in idle if status.num_exchanges == least]
    names = ", ".join(str(status.rank) for status in culprits)
    latest = culprits[0].progress
    layer = "" if latest is None or latest.layer is None else f"layer {latest.layer}, "
    phase = "start" if latest is None else f"{layer}{latest.phase} {latest.done}/{latest.total}"
    return Failure(f"rank {names} has not moved for {limit_s:g} s ({phase}, exchange {least})", retryable=True)


@dataclass
class Outbox:
    """Implements `cluster.messages.Reporter`: filled by the training thread, read by polls.

    Attributes
    ----------
    phases: the latest progress of every phase so far.
    beats: signs of life so far.
    """

    messages: list[Message] = field(default_factory=list)
    phases: list[Progress] = field(default_factory=list)
    stopping: bool = False
    beats: int = 0

    def beat(self) -> None:
        self.beats += 1

    def progress(self, progress: Progress) -> None:
        self.beat()
        if self.phases and (self.phases[-1].layer, self.phases[-1].phase) == (progress.layer, progress.phase):
            self.phases[-1] = progress
        else:
            self.phases.append(progress)

    def send(self, message: Message) -> None:
        self.messages.append(message)


class Worker:
    """One rank of a group.

    Parameters
    ----------
    assignment: what to do; see `Assignment`.
    """

    training_class: type[Training] = Training
    """The program; tests replace it to inject faults."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self._store: dist.Store | None = None
        self._exchange: Exchange = IDENTITY
        self._outbox = Outbox()
        self._done = self._stopped = False
        self._failure: Failure | None = None
        self._thread: threading.Thread | None = None
        self._lease_s: float | None = None
        self._mark: tuple[int, ...] = ()
        self._moved = time.monotonic()

    def expire_after(self, lease_s: float) -> None:
        """End this process once the controller has called nothing for so long: it is gone, or a new group has come.

        A rank that is cut off, or whose driver was killed, must neither live for ever nor go on to write. The timer is
        the standard library's, outside of Python: it also ends a process whose interpreter is stuck.
        """
        self._lease_s = lease_s
        self._renew()

    def _renew(self) -> None:
        if self._lease_s is not None:
            faulthandler.dump_traceback_later(self._lease_s, exit=True, file=2)

    def describe(self, address: str) -> Place:
        """Where this rank runs, on the node with this address, and whether it reaches the run directory."""
        self._renew()
        told = self.assignment
        reach = answer(told.run_dir, told.token, told.rank)
        return Place(told.rank, socket.gethostname(), address, os.getpid(), allowed_cpus(), reach)

    def bind(self, interface: str | None, address: str) -> tuple[str, int]:
        """Rank 0: bind the store of the rendezvous on a free port. Returns its address and port."""
        self._renew()
        _, own = interface_of(interface, address)
        self._store, port = open_store(own, self.assignment.config.cluster.start_timeout_s)
        return own, port

    def join(self, interface: str | None, address: str, store: tuple[str, int]) -> None:
        """Meet the other ranks. Blocks until all have come or the time is up."""
        self._renew()
        config = self.assignment.config
        name, _ = interface_of(interface, address)
        use_interface(name)
        if self._store is None:
            self._store = connect_store(*store, config.cluster.start_timeout_s)
        self._exchange = join_group(
            self._store,
            self.assignment.generation,
            self.assignment.rank,
            config.checked_mesh().world_size,
            self._device(),
            config.cluster.collective_timeout_s,
        )

    def begin(self, threads: int) -> None:
        """Start to train, in a thread; returns at once."""
        self._renew()
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="training", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the training thread to stop at a step that all ranks agree on; returns at once."""
        self._outbox.stopping = True

    def poll(self, first: int) -> Status:
        """Status of this rank, with the messages from number `first` on."""
        self._renew()
        done, failure = self._done, self._failure  # read before the messages: none is missed when it is the last poll
        return Status(
            rank=self.assignment.rank,
            done=done,
            failure=failure,
            phases=list(self._outbox.phases),
            messages=self._outbox.messages[first:],
            num_exchanges=self._exchange.num_exchanges,
            stopped=self._stopped,
            idle_s=self._idle_s(),
        )

    def _idle_s(self) -> float:
        """See `Status`: what the training thread counts anyway is compared from poll to poll, so it pays nothing."""
        exchange, outbox = self._exchange, self._outbox
        mark = (exchange.num_exchanges, getattr(exchange, "num_completed", 0), outbox.beats, len(outbox.messages))
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._moved = mark, now
        return now - self._moved

    def _device(self) -> torch.device:
        if self.assignment.config.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device: expected a CUDA device on {socket.gethostname()}, found none")
        return torch.device(self.assignment.config.device)

    def _run(self, threads: int) -> None:
        try:
            torch.set_num_threads(threads)
            exact_float32()
            with torch.no_grad():
                self.training_class(self.assignment, self._exchange, self._outbox, self._device()).run()
        except Stopped:
            self._stopped = True
        except PeerTimeout as error:
            self._failure = classify(error)  # its message names the rank
        except Exception as error:
            hide = Redactor(os.environ)  # this node's secrets need not be the driver's
            self._outbox.send(Traceback(hide(traceback.format_exc())))
            failure = classify(error)
            self._failure = replace(failure, message=hide(f"rank {self.assignment.rank}: {failure.message}"))
        self._done = True
