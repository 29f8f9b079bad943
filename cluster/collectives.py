"""Exchanges between ranks by torch.distributed, and their rendezvous.

`TorchExchange` implements `simmatch.sharding.exchange.Exchange`, and `TorchLink` `simmatch.sharding.mesh.Link`: nccl on
CUDA, gloo on CPU. A rank alone uses `IdentityExchange`, the same code with nothing to move. `cluster.connections` makes
those of all axes of a mesh.

Rendezvous without a port race: rank 0 binds a socket on port 0 of the chosen interface, hands the listening socket
to torch's store, and only then publishes the address.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from simmatch.parts import timed
from simmatch.sharding.exchange import Done, Handle

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Called `all_gather_into_tensor` before torch 2.14."""


WATCHDOG_FACTOR = 2.0
"""nccl's own limit on an exchange, over the run's."""


class PeerTimeout(RuntimeError):
    """An exchange did not complete: a rank is missing, or the time limit is over."""


class Pending:
    """An exchange that has started."""

    def __init__(self, work: dist.Work, connection: Connection) -> None:
        self._work, self._connection = work, connection

    def wait(self) -> None:
        connection, started = self._connection, time.perf_counter()
        try:
            with timed("waiting"):
                self._work.wait()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise  # of this rank's own device
        except RuntimeError as error:
            of = f" of {connection.name}" if connection.name else ""
            raise PeerTimeout(
                f"{connection.own_name} waited for exchange {connection.num_exchanges}{of} "
                f"(limit {connection.timeout_s:g} s): {error}"
            ) from error
        connection.waited_s += time.perf_counter() - started
        connection.num_completed += 1


class DeviceCounter:
    """Counts what a device has come to, in memory of the host: reading it asks no device, which might not answer.

    Counting is queued like any other work, so that it also counts in every replay of a captured graph: one addition to
    a number on the device, and a copy of it to pinned memory.

    >>> counter = DeviceCounter(torch.device("cpu"))
    >>> counter.advance()
    >>> counter.value
    1
    """

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._copy = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")

    def advance(self) -> None:
        """Count one more, once the device has done all that is queued before."""
        self._count += 1
        self._copy.copy_(self._count, non_blocking=True)

    @property
    def value(self) -> int:
        """What the device has counted so far; may be read in any thread."""
        return int(self._copy)


class Connection:
    """Ranks that exchange tensors with each other, and what this one has exchanged with them so far.

    Parameters
    ----------
    group: of these ranks.
    timeout_s: limit on a wait.
    counter: counts the exchanges that the rank's device has come to. None: they are started by the host itself.
    name: which ranks these are, for messages, the same on all of them; empty for all ranks of the run.
    own_name: this rank, for messages.

    Attributes
    ----------
    num_exchanges, num_completed: exchanges started and completed by this rank; all ranks count alike.
    bytes_exchanged: bytes that reached this rank from the others.
    waited_s: seconds spent waiting for exchanges. Under nccl a wait is queued on the device and takes no time here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float,
        counter: DeviceCounter | None = None,
        *,
        name: str = "",
        own_name: str = "",
    ) -> None:
        self.group, self.timeout_s, self.name, self._counter = group, timeout_s, name, counter
        self.capturable = counter is not None  # exchanges are queued on the device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.own_name = own_name or f"rank {self.rank} of {self.world_size}"
        self.num_exchanges = self.num_completed = self.bytes_exchanged = 0
        self.waited_s = 0.0

    @property
    def num_started(self) -> int:
        """Exchanges that this rank has come to: under nccl its device, of which the host is ahead."""
        return self.num_exchanges if self._counter is None else self._counter.value

    def _count(self, received: int) -> None:
        """Count an exchange that brings so many bytes."""
        self.num_exchanges += 1
        self.bytes_exchanged += received
        if self._counter is not None:
            self._counter.advance()

    def _pending(self, work: dist.Work | None) -> Pending:
        assert work is not None  # asked for with async_op
        return Pending(work, self)


class TorchExchange(Connection):
    """Collectives of one group of ranks."""

    asynchronous = True

    def all_gather(self, gathered: Tensor) -> Handle:
        own = gathered[self.rank]
        self._count(own.nbytes * (self.world_size - 1))
        with timed("exchange"):
            return self._pending(_all_gather(gathered.view(-1), own.view(-1), group=self.group, async_op=True))

    def all_to_all(self, received: Tensor, sent: Tensor) -> Handle:
        """See `Exchange.all_to_all`. Adding what it returns in order of ranks gives the same bits in every run.

        gloo's reduce-scatter adds in an order that depends on the rank, and takes about twice as long: between three
        processes of one machine 7 ms for slices of 100,000 float32 values, against 4 ms for this and the sum.
        """
        self._count(sent[0].nbytes * (self.world_size - 1))
        with timed("exchange"):
            work = dist.all_to_all_single(received.view(-1), sent.view(-1), group=self.group, async_op=True)
            return self._pending(work)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        self._count(tensor.nbytes if self.rank != source else 0)
        with timed("exchange"):
            return self._pending(dist.broadcast(tensor, group_src=source, group=self.group, async_op=True))

    def gather(self, own: Tensor, gathered: Tensor) -> Handle:
        self._count(own.nbytes * (self.world_size - 1) if self.rank == 0 else 0)
        targets = list(gathered.unbind()) if self.rank == 0 else None
        with timed("exchange"):
            return self._pending(dist.gather(own, targets, group_dst=0, group=self.group, async_op=True))

    def count(self, exchanges: int, received: int) -> None:
        self.num_exchanges += exchanges
        self.num_completed += exchanges
        self.bytes_exchanged += received


class TorchLink(Connection):
    """Tensors from one rank to another, in order: a group of two ranks, which nothing else uses.

    gloo moves a tensor once both sides have started: `wait` of a sender returns when the receiver has taken it, so a
    sender that waits for one of its earlier tensors is never further ahead than by those in between.
    """

    def send(self, tensor: Tensor) -> Handle:
        self._count(0)
        if tensor.numel() == 0:  # gloo would wait for ever
            return self._nothing()
        with timed("exchange"):
            return self._pending(dist.isend(tensor, group=self.group, group_dst=1 - self.rank))

    def receive(self, tensor: Tensor) -> Handle:
        self._count(tensor.nbytes)
        if tensor.numel() == 0:
            return self._nothing()
        with timed("exchange"):
            return self._pending(dist.irecv(tensor, group=self.group, group_src=1 - self.rank))

    def _nothing(self) -> Handle:
        self.num_completed += 1
        return Done()


def open_store(address: str, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """Bind the store of a rendezvous to a free port of one interface address. Returns the store and its port."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def connect_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that rank 0 has bound."""
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def join_group(
    store: dist.TCPStore, generation: int, rank: int, world_size: int, device: torch.device, timeout_s: float
) -> TorchExchange:
    """Join the group of one generation. Blocks until all ranks have joined, at most `timeout_s`.

    gloo ends an exchange after `timeout_s` with an exception. nccl's watchdog ends the process of every rank that is
    waiting, and none of them can say for whom (TORCH_NCCL_ASYNC_ERROR_HANDLING=3, torch's default). No other setting
    helps: with 2 the rank goes on computing with what the exchange left, and TORCH_NCCL_BLOCKING_WAIT makes the host
    wait for every exchange. So the watchdog gets `WATCHDOG_FACTOR` times as long, and the controller is the first to
    know.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    counter = DeviceCounter(device) if backend == "nccl" else None
    timeout_s *= WATCHDOG_FACTOR if backend == "nccl" else 1.0
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"generation-{generation}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    group = dist.group.WORLD
    assert group is not None
    return TorchExchange(group, timeout_s, counter)
