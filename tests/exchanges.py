"""Several owners in one process: an exchange between threads that is as unforgiving as a network.

What a real collective leaves undefined is made to fail here: slices of the others are NaN until `wait`, an own
slice that is written to while its exchange is under way raises, and so do owners that disagree about a shape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.mesh import Mesh

T = TypeVar("T")

TIMEOUT_S = 20.0


class Board:
    """Where `world_size` owners post their slices, one page per exchange."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.pages: dict[int, dict[int, Tensor]] = {}
        self.readers: dict[int, int] = {}

    def post(self, page: int, rank: int, own: Tensor) -> None:
        with self.changed:
            self.pages.setdefault(page, {})[rank] = own
            self.changed.notify_all()

    def read(self, page: int) -> list[Tensor]:
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.pages[page]) == self.world_size, TIMEOUT_S):
                missing = sorted(set(range(self.world_size)) - set(self.pages[page]))
                raise TimeoutError(f"exchange {page}: nothing from rank {missing} within {TIMEOUT_S:g} s")
            slices = [self.pages[page][rank] for rank in range(self.world_size)]
            self.readers[page] = self.readers.get(page, 0) + 1
            if self.readers[page] == self.world_size:
                del self.pages[page], self.readers[page]
            return slices


class Pending:
    """An exchange that the others may not have joined yet.

    `source` is what this owner gives, and must leave alone until `wait`; `posted` what it was at the start. `deliver`
    hears of every owner's post.
    """

    def __init__(
        self,
        exchange: ThreadExchange,
        page: int,
        source: Tensor,
        posted: Tensor,
        deliver: Callable[[int, Tensor], Any],
    ) -> None:
        self.exchange, self.page, self.source, self.posted, self.deliver = exchange, page, source, posted, deliver

    def wait(self) -> None:
        own, started = self.exchange.rank, time.perf_counter()
        posts = self.exchange.board.read(self.page)
        self.exchange.waited_s += time.perf_counter() - started
        if not _same_bytes(self.source, self.posted):
            raise AssertionError(f"rank {own} wrote to its slice while exchange {self.page} was under way")
        for rank, part in enumerate(posts):
            if part.shape != self.posted.shape:
                raise AssertionError(f"rank {rank} sent {list(part.shape)}, rank {own} {list(self.posted.shape)}")
            self.deliver(rank, part)


class ThreadExchange:
    """One owner's end of a board; the protocol of `simmatch.sharding.exchange.Exchange`.

    Attributes
    ----------
    delay_s: slept before every exchange.
    num_exchanges, bytes_exchanged, waited_s: as in the protocol.
    """

    capturable = False

    def __init__(self, board: Board, rank: int, *, asynchronous: bool = False, delay_s: float = 0.0) -> None:
        self.board, self.rank, self.asynchronous, self.delay_s = board, rank, asynchronous, delay_s
        self.world_size = board.world_size
        self.num_exchanges = self.bytes_exchanged = 0
        self.waited_s = 0.0

    def all_gather(self, gathered: Tensor) -> Pending:
        assert gathered.shape[0] == self.world_size
        own = gathered[self.rank].clone()
        for rank in range(self.world_size):
            if rank != self.rank:
                gathered[rank] = _undefined(gathered)

        def deliver(rank: int, part: Tensor) -> None:
            if rank != self.rank:
                gathered[rank].copy_(part)

        return Pending(self, self._post(own, own.nbytes * (self.world_size - 1)), gathered[self.rank], own, deliver)

    def all_to_all(self, received: Tensor, sent: Tensor) -> Pending:
        assert received.shape == sent.shape
        assert sent.shape[0] == self.world_size
        received.fill_(_undefined(received))
        posted = sent.clone()
        page = self._post(posted, sent[0].nbytes * (self.world_size - 1))
        return Pending(self, page, sent, posted, lambda rank, part: received[rank].copy_(part[self.rank]))

    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        assert tensor.is_contiguous()
        if self.rank != source:
            tensor.fill_(_undefined(tensor))
        posted = tensor.clone()
        page = self._post(posted, 0 if self.rank == source else tensor.nbytes)

        def deliver(rank: int, part: Tensor) -> None:
            if rank == source:
                tensor.copy_(part)

        return Pending(self, page, tensor, posted, deliver)

    def gather(self, own: Tensor, gathered: Tensor) -> Pending:
        assert own.is_contiguous()
        first = self.rank == 0
        assert gathered.shape == ((self.world_size if first else 0), *own.shape)
        gathered.fill_(_undefined(gathered))
        posted = own.clone()
        page = self._post(posted, own.nbytes * (self.world_size - 1) if first else 0)

        def deliver(rank: int, part: Tensor) -> None:
            if first:
                gathered[rank].copy_(part)

        return Pending(self, page, own, posted, deliver)

    def _post(self, own: Tensor, received_bytes: int) -> int:
        """Page on the board of the exchange that this begins."""
        time.sleep(self.delay_s)
        page, self.num_exchanges = self.num_exchanges, self.num_exchanges + 1
        self.bytes_exchanged += received_bytes
        self.board.post(page, self.rank, own)
        return page


class ThreadLink:
    """One direction from a rank to another.

    As over a network, nothing moves before the receiver has asked for it: until then `wait` of the sender blocks.

    Attributes
    ----------
    delay_s: slept before every message is delivered.
    held: messages that must have been sent before the first is delivered.
    most_pending: most messages sent at a time that the receiver had not taken.
    """

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.changed, self.delay_s = threading.Condition(), delay_s
        self.sent: list[Tensor] = []
        self.taken = self.asked = self.most_pending = self.held = 0

    def send(self, tensor: Tensor) -> Sent:
        assert tensor.is_contiguous()
        with self.changed:
            self.sent.append(tensor.clone())
            self.most_pending = max(self.most_pending, len(self.sent) - self.taken)
            self.changed.notify_all()
            return Sent(self, len(self.sent) - 1, tensor)

    def receive(self, tensor: Tensor) -> Received:
        assert tensor.is_contiguous()
        tensor.fill_(_undefined(tensor))
        self.asked += 1
        return Received(self, self.asked - 1, tensor)


class LinkEnd:
    """One rank's end of a connection; the protocol of `simmatch.sharding.mesh.Link`."""

    def __init__(self, to: ThreadLink, back: ThreadLink) -> None:
        self.to = to
        self.send, self.receive = to.send, back.receive


class Sent:
    """A message that the receiver may not have taken yet."""

    def __init__(self, link: ThreadLink, number: int, source: Tensor) -> None:
        self.link, self.number, self.source = link, number, source

    def wait(self) -> None:
        with self.link.changed:
            if not self.link.changed.wait_for(lambda: self.link.taken > self.number, TIMEOUT_S):
                raise TimeoutError(f"message {self.number} was not taken within {TIMEOUT_S:g} s")
        if not _same_bytes(self.source, self.link.sent[self.number]):
            raise AssertionError(f"message {self.number} was written to while it was under way")


class Received:
    """A message that may not have been sent yet."""

    def __init__(self, link: ThreadLink, number: int, target: Tensor) -> None:
        self.link, self.number, self.target = link, number, target

    def wait(self) -> None:
        time.sleep(self.link.delay_s)
        with self.link.changed:
            wanted = max(self.number + 1, self.link.held)
            if not self.link.changed.wait_for(lambda: len(self.link.sent) >= wanted, TIMEOUT_S):
                raise TimeoutError(f"message {self.number} was not sent within {TIMEOUT_S:g} s")
            message = self.link.sent[self.number]
            if (message.shape, message.dtype) != (self.target.shape, self.target.dtype):
                raise AssertionError(f"message {self.number}: {message.shape} sent, {self.target.shape} asked for")
            self.target.copy_(message)
            self.link.taken = self.number + 1
            self.link.changed.notify_all()


def held(error: Exception | None, exchange: Exchange) -> LocalFault:
    """A fault that holds this exception of its owner, if any; an owner alone raises it."""
    fault = LocalFault(exchange)
    with fault:
        if error is not None:
            raise error
    return fault


def run_owners(
    world_size: int,
    owner: Callable[[ThreadExchange], Any],
    *,
    asynchronous: bool = False,
    delays_s: dict[int, float] | None = None,
) -> list[Any]:
    """Run `owner` once per rank, each in its thread; what each returned, or the exception it raised."""
    delays_s = delays_s or {}
    board = Board(world_size)
    ends = [
        ThreadExchange(board, rank, asynchronous=asynchronous, delay_s=delays_s.get(rank, 0.0))
        for rank in range(world_size)
    ]
    return _run(ends, owner)


def meshes(
    replicas: int = 1,
    stages: int = 1,
    owners: int = 1,
    *,
    asynchronous: bool = False,
    delays_s: dict[int, float] | None = None,
) -> list[Mesh]:
    """The mesh of every rank, in order: rank = (stage · replicas + replica) · owners + owner.

    delays_s: slept by a rank before every exchange, and before it takes a message.
    """
    delays_s = delays_s or {}
    boards: dict[tuple[Any, ...], Board] = {}
    links: dict[tuple[int, int, int], tuple[ThreadLink, ThreadLink]] = {}  # to (replica, stage, owner), and back

    def end(group: tuple[Any, ...], size: int, place: int, rank: int) -> ThreadExchange:
        board = boards.setdefault(group, Board(size))
        return ThreadExchange(board, place, asynchronous=asynchronous, delay_s=delays_s.get(rank, 0.0))

    def link_to(replica: int, stage: int, owner: int, *, upper: bool) -> LinkEnd | None:
        if not 0 < stage < stages:
            return None
        delay_s = delays_s.get((stage * replicas + replica) * owners + owner, 0.0)
        up, down = links.setdefault((replica, stage, owner), (ThreadLink(delay_s=delay_s), ThreadLink()))
        return LinkEnd(down, up) if upper else LinkEnd(up, down)

    made = []
    for rank in range(replicas * stages * owners):
        stage, replica, owner = rank // (replicas * owners), rank // owners % replicas, rank % owners
        made.append(
            Mesh(
                everyone=end(("everyone",), replicas * stages * owners, rank, rank),
                owners=end(("owners", replica, stage), owners, owner, rank),
                replicas=end(("replicas", stage, owner), replicas, replica, rank),
                columns=end(("columns", stage), replicas * owners, replica * owners + owner, rank),
                stage=stage,
                stages=stages,
                below=link_to(replica, stage, owner, upper=True),
                above=link_to(replica, stage + 1, owner, upper=False),
            )
        )
    return made


def run_meshes(places: list[Mesh], member: Callable[[Mesh], Any]) -> list[Any]:
    """Run `member` once per rank of a mesh, each in its thread; outcomes as of `run_owners`."""
    return _run(places, member)


def _run(places: list[Any], member: Callable[[Any], Any]) -> list[Any]:
    outcomes: list[Any] = [TimeoutError("this rank never ended")] * len(places)

    def work(rank: int) -> None:
        try:
            outcomes[rank] = member(places[rank])
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S + 10.0)
    return outcomes


def results(outcomes: list[Any]) -> list[Any]:
    """The outcomes, or the first exception among them."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _undefined(tensor: Tensor) -> float | int:
    """A value that no owner sends."""
    return torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return bool((one == other).logical_or(one.isnan() & other.isnan()).all())


def of_type(messages: list[Any], kind: type[T]) -> list[T]:
    """Those of a rank's messages that are of one class, in order."""
    return [message for message in messages if isinstance(message, kind)]
