"""The protocol by which solvers and layers exchange tensors with other owners of channels.

The method uses only this protocol and does not depend on processes. `cluster.collectives` implements it with
torch.distributed. A single owner of all channels uses `IdentityExchange`: the same code, with nothing to move.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Handle(Protocol):
    """An exchange in progress.

    >>> gathered = torch.ones(1, 3)
    >>> IDENTITY.all_gather(gathered).wait()
    """

    def wait(self) -> None:
        """Block until the exchange is complete. Raises an error if a peer is missing or a time limit is exceeded."""


class Exchange(Protocol):
    """Collective operations between the owners of one layer's output channels.

    All owners must call the same operations, with the same shapes, in the same order.

    >>> exchange: Exchange = IDENTITY
    >>> exchange.rank, exchange.world_size
    (0, 1)
    """

    rank: int
    """Number of this owner, 0 ≤ rank < world_size."""

    world_size: int
    """G, the number of owners."""

    asynchronous: bool
    """Whether an exchange proceeds while its caller computes, so that several in progress save time."""

    capturable: bool
    """Whether exchanges may be part of a CUDA graph."""

    num_exchanges: int
    """Number of exchanges started so far, equal for all owners."""

    bytes_exchanged: int
    """Number of bytes received from other owners so far."""

    waited_s: float
    """Seconds that this owner has spent in `Handle.wait`."""

    def all_gather(self, gathered: Tensor) -> Handle:
        """Start an all-gather of `gathered` [G, …]: on entry every owner has written `gathered[rank]`; after `wait` it
        holds the slices of all owners, the same bytes for every owner."""

    def all_to_all(self, received: Tensor, sent: Tensor) -> Handle:
        """Start to send `sent[r]`, of [G, …], to owner r: after `wait`, `received[r]` is what owner r sent here.

        This is the first half of a reduce-scatter. The caller then sums over r, in an order of its choice.
        """

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        """Start to send a contiguous tensor of owner `source` to all others: after `wait`, every owner's `tensor` holds
        its values. No owner allocates more than the tensor it gives."""

    def gather(self, own: Tensor, gathered: Tensor) -> Handle:
        """Start to send a contiguous tensor of every owner to owner 0: after `wait`, its `gathered` [G, …] holds all.
        The others give an empty tensor for it."""

    def count(self, exchanges: int, received: int) -> None:
        """Count exchanges, and bytes that they received, which a replay of a CUDA graph makes."""


class Done:
    """The handle of an exchange that is complete.

    >>> Done().wait()
    """

    def wait(self) -> None:
        return None


class IdentityExchange:
    """The exchange of a single owner, which has nothing to move.

    >>> received, sent = torch.zeros(1, 3), torch.ones(1, 3)
    >>> IdentityExchange().all_to_all(received, sent).wait()
    >>> received
    tensor([[1., 1., 1.]])
    """

    rank = 0
    world_size = 1
    asynchronous = False
    capturable = True
    num_exchanges = 0
    bytes_exchanged = 0
    waited_s = 0.0

    def __reduce__(self) -> str:
        return "IDENTITY"  # copying or unpickling gives the module's instance

    def all_gather(self, gathered: Tensor) -> Handle:
        return Done()

    def all_to_all(self, received: Tensor, sent: Tensor) -> Handle:
        received.copy_(sent)
        return Done()

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return Done()

    def gather(self, own: Tensor, gathered: Tensor) -> Handle:
        gathered[0].copy_(own)
        return Done()

    def count(self, exchanges: int, received: int) -> None:
        return None


IDENTITY = IdentityExchange()
"""The default exchange; it has no state."""
