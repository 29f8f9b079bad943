"""A rank, as a plain class: the controller calls it, and one of its threads trains.

Nothing here depends on Ray: `cluster.group` makes actors of it in one place. The training thread never waits for the
controller, and the controller's calls are answered while it computes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist

from cluster.allocation import allocation
from cluster.collectives import WATCHDOG_FACTOR, PeerTimeout, connect_store, join_group, open_store
from cluster.connections import Traffic, join_mesh
from cluster.cpus import ThreadClock
from cluster.failures import classify
from cluster.layout import RankInfo
from cluster.messages import Outbox, RankStatus, Traceback
from cluster.network import interface_of, use_interface
from cluster.node_usage import NodeUsage
from cluster.node_warnings import node_warnings
from cluster.policy import Failure
from cluster.redaction import Redactor
from cluster.shared_folder import copy_nonce
from cluster.training import Assignment, Stopped, Training
from simmatch.config import ConfigError
from simmatch.devices import check_device
from simmatch.precision import exact_float32
from simmatch.sharding.mesh import Mesh


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
        self._mesh = Mesh()
        self._outbox = Outbox(assignment.rank)
        self._done = self._stopped = False
        self._failure: Failure | None = None
        self._thread: threading.Thread | None = None
        self._clock: ThreadClock | None = None
        self._usage: NodeUsage | None = None
        self._lease_s: float | None = None
        self._mark: tuple[float, ...] = ()
        self._moved = time.monotonic()
        self._terminated = False

    def expire_after(self, lease_s: float) -> None:
        """End this process once the controller has not called for `lease_s` seconds: it is gone, or has a new group.

        A rank that is cut off, or whose driver was killed, must neither live for ever nor go on writing. The standard
        library's timer runs outside the interpreter: it also ends a process whose interpreter is stuck.
        """
        self._lease_s = lease_s
        self._renew()

    def _renew(self) -> None:
        if self._lease_s is not None:
            faulthandler.dump_traceback_later(self._lease_s, exit=True, file=2)

    def outlast_sigterm(self) -> None:
        """Report SIGTERM instead of ending by it: the controller asks all ranks for a checkpoint, and ends this one.

        For the main thread only. While that waits for calls, the handler runs when the next one comes, such as a poll.
        """

        def note(*_: object) -> None:
            self._terminated = True

        signal.signal(signal.SIGTERM, note)

    def describe(self, interface: str | None, address: str) -> RankInfo:
        """Where this rank runs, and what it cannot use of what the run needs. `address` is that of its node."""
        self._renew()
        rank = self.assignment.rank
        no_device = ""
        try:
            check_device(self._device)
        except ConfigError as error:
            no_device = str(error)
        return RankInfo(rank, os.getpid(), allocation(interface, address), self._folder_error(), no_device)

    def _folder_error(self) -> str:
        """Why this rank cannot use the run directory, or an empty string."""
        return copy_nonce(self.assignment.run_dir, self.assignment.token, self.assignment.rank)

    def renumber(self, rank: int) -> None:
        """Be another rank; for the time before the ranks meet."""
        self._renew()
        self.assignment = replace(self.assignment, rank=rank)
        self._outbox = Outbox(rank)

    def bind(self, interface: str | None, address: str) -> tuple[str, int]:
        """Rank 0: bind the store of the rendezvous on a free port. Returns its address and port."""
        self._renew()
        _, own = interface_of(interface, address)
        self._store, port = open_store(own, self.assignment.config.cluster.start_timeout_s)
        return own, port

    def join(self, interface: str | None, address: str, store: tuple[str, int]) -> None:
        """Join the other ranks. Blocks until all have joined, or `collective_timeout_s` is over."""
        self._renew()
        config = self.assignment.config
        name, _ = interface_of(interface, address)
        use_interface(name)
        if self._store is None:
            self._store = connect_store(*store, config.cluster.start_timeout_s)
        everyone = join_group(
            self._store,
            self.assignment.generation,
            self.assignment.rank,
            config.mesh.world_size,
            self._device,
            config.cluster.collective_timeout_s,
        )
        limit_s = config.cluster.stall_timeout_s * (WATCHDOG_FACTOR if self._device.type == "cuda" else 1.0)
        self._mesh = join_mesh(everyone, config.mesh, self._device, link_timeout_s=limit_s)

    def begin(self, threads: int, *, samples: bool = False) -> None:
        """Start training in a thread, and sampling of the node in another; returns at once."""
        self._renew()
        self._moved = time.monotonic()
        if samples:
            self._usage = NodeUsage(self.assignment.config.tracking.system_metrics_s)
            self._usage.start()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="training", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the training thread to stop at a step that all ranks agree on; returns at once."""
        self._outbox.stopping = True

    def poll(self, first: int) -> RankStatus:
        """Status of this rank, with the messages from number `first` on."""
        self._renew()
        done, failure = self._done, self._failure  # read before the messages: none is missed when it is the last poll
        return RankStatus(
            rank=self.assignment.rank,
            done=done,
            failure=failure,
            phases=list(self._outbox.phases),
            messages=self._outbox.since(first),
            exchanges=Traffic(self._mesh).started,
            usage=None if self._usage is None else self._usage.take(),
            stopped=self._stopped,
            terminated=self._terminated,
            idle_s=self._idle_s(),
        )

    def _idle_s(self) -> float:
        """See `RankStatus`. Compares what the training thread counts anyway, so it costs that thread nothing."""
        calibrating = self._outbox.phases and self._outbox.phases[-1].phase == "calibrate"
        computed_s = self._clock.seconds if calibrating and self._clock is not None else None
        mark = (*Traffic(self._mesh).mark, self._outbox.beats, self._outbox.sent, computed_s or 0.0)
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._moved = mark, now
        return now - self._moved

    @property
    def _device(self) -> torch.device:
        """The device of all tensors; Ray hides all GPUs but the rank's own."""
        return torch.device(self.assignment.config.device)

    @property
    def _name(self) -> str:
        """This rank in a message, with the GPU that may be the cause."""
        rank = f"rank {self.assignment.rank}"
        if self._device.type != "cuda":
            return rank
        return f"{rank} on {socket.gethostname()}, GPU {os.environ.get('CUDA_VISIBLE_DEVICES') or 0}"

    def _run(self, threads: int) -> None:
        self._clock = ThreadClock()
        try:
            torch.set_num_threads(threads)
            exact_float32()
            with torch.no_grad(), node_warnings(self._outbox.send):
                self.training_class(self.assignment, self._mesh, self._outbox, self._device).run()
        except Stopped:
            self._stopped = True
        except PeerTimeout as error:
            self._failure = classify(error)  # its message names the rank
        except Exception as error:
            hide = Redactor(os.environ)  # this node's secrets may differ from the driver's
            self._outbox.send(Traceback(hide(traceback.format_exc())))
            failure = classify(error)
            self._failure = replace(failure, message=hide(f"{self._name}: {failure.message}"))
        self._done = True
