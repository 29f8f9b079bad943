"""How the solver and the layer reach rows that another process owns: a protocol, and its identity for one owner.

The method is written against this protocol and knows nothing of ranks or processes. `cluster.collectives`
implements it with torch.distributed; one owner of all channels uses `IdentityExchange`, the same code with
nothing to move.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Block until the exchange is complete. Raises when a peer is missing or the time is up."""


class Exchange(Protocol):
    """Collective operations between the owners of one layer's output channels.

    Every owner calls the same operations with the same shapes in the same order.
    """

    rank: int
    """This owner's position among the owners, 0 ≤ rank < world_size."""

    world_size: int
    """G, the number of owners."""

    asynchronous: bool
    """Whether an exchange proceeds while its caller computes, so that it is worth having several in flight."""

    num_exchanges: int
    """Exchanges started so far; all owners count alike."""

    bytes_exchanged: int
    """Bytes that reached this owner from the others so far."""

    waited_s: float
    """Seconds that this owner has spent in `Handle.wait`, and so not computing."""

    def all_gather(self, gathered: Tensor) -> Handle:
        """Start to fill `gathered` [G, …]: on entry every owner has written `gathered[rank]`; after `wait` it
        holds every owner's slice, the same bytes everywhere."""

    def all_to_all(self, received: Tensor, sent: Tensor) -> Handle:
        """Start to send `sent[r]` to owner r, of [G, …]: after `wait`, `received[r]` is what owner r sent here.

        Half of a reduce-scatter: the other half, the sum over r, is the caller's, in an order that it chooses.
        """


class Done:
    """A handle of an exchange that is already complete."""

    def wait(self) -> None:
        return None


class IdentityExchange:
    """The exchange of a single owner: everything is already where it is needed."""

    rank = 0
    world_size = 1
    asynchronous = False
    num_exchanges = 0
    bytes_exchanged = 0
    waited_s = 0.0

    def __reduce__(self) -> str:
        return "IDENTITY"  # a copy or a pickle of it is the one there is

    def all_gather(self, gathered: Tensor) -> Handle:
        return Done()

    def all_to_all(self, received: Tensor, sent: Tensor) -> Handle:
        received.copy_(sent)
        return Done()


IDENTITY = IdentityExchange()
"""The exchange used wherever none is injected; it has no state."""
