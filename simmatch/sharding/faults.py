"""Faults of one owner, raised by all owners at the same exchange.

Every exchange after which a fault can be raised includes one number of each owner, the status:

    finite        no fault
    −inf          the owner has an exception
    NaN or +inf   the owner has values that are not finite

Where possible, the status is a nonnegative quantity that is exchanged anyway, such as a largest magnitude; otherwise it
is 0 if there is no fault. All owners read the same bytes, so either all raise an error or none.

Some exchanges are between some of the ranks that share an update: the owners of one replica, or a rank that solves its
columns alone. What is found there is held (`apart`) until the next exchange of all of them, at which each rank reports
what is its own.

To raise an error the host has to wait for the device. There are two modes, with one interface:

    LocalFault      raises at the exchange: nothing is computed after it
    RecordedFault   an update continues, and changes nothing if some status reported a fault; its statuses remain
                    on the device, until all owners read them and raise the same error (`simmatch.sharding.recording`)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from simmatch.documents import listed
from simmatch.sharding.exchange import Exchange

MOST_NAMED = 8
"""Ranks that a message names."""

EXCEPTION = -math.inf
"""Status of an owner that has an exception."""


class SharedFault(RuntimeError):
    """At least one owner has a fault; all owners raise this error at the same exchange.

    Attributes
    ----------
    kind: description of the fault.
    ranks: the owners that reported it.
    update: number of the update, the first being 1, for a fault that was recorded; else None.

    >>> str(SharedFault("non-finite activities", [0, 2]))
    'non-finite activities on ranks 0, 2'
    >>> str(SharedFault("exception", [1], update=7))
    'exception on rank 1 in update 7'
    """

    def __init__(self, kind: str, ranks: list[int], update: int | None = None) -> None:
        self.kind, self.ranks, self.update = kind, ranks, update
        when = "" if update is None else f" in update {update}"
        super().__init__(f"{kind} on {named(ranks)}{when}")

    def __reduce__(self) -> tuple[type[SharedFault], tuple[str, list[int], int | None]]:
        return type(self), (self.kind, self.ranks, self.update)


def named(ranks: Sequence[int]) -> str:
    """Ranks by number, for a message; of many the first, as each of them may send such a message.

    >>> named([1]), named([0, 2]), named(range(512))
    ('rank 1', 'ranks 0, 2', 'ranks 0, 1, 2, 3, 4, 5, 6, 7 and 504 more')
    """
    return f"rank{'' if len(ranks) == 1 else 's'} {listed(ranks, MOST_NAMED)}"


class LocalFault:
    """Holds an exception of this owner until the next exchange, at which all owners raise it.

    A single owner raises its exceptions where they occur.

    >>> from types import SimpleNamespace
    >>> fault = LocalFault(SimpleNamespace(world_size=2))
    >>> with fault:
    ...     raise OSError("disk full")  # held, not raised
    >>> statuses = torch.zeros(2)
    >>> fault.mark(statuses[0])  # then an exchange sends the statuses to all owners
    >>> fault.raise_shared(statuses, "activities")
    Traceback (most recent call last):
    simmatch.sharding.faults.SharedFault: exception on rank 0
    """

    recorded = False
    """Whether faults are recorded on the device, so that nothing in an update may wait for it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.error: Exception | None = None
        self._found: list[Tensor] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._exchange.world_size == 1 or not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def found(self, status: Tensor) -> None:
        """Add a status [1] of this owner, to be reported at the next exchange."""
        self._found.append(status)

    def mark(self, status: Tensor) -> None:
        """Write what this owner has found, and its exception, if there is one, into its status.

        A held `SharedFault` comes from an exchange of some of the owners, and means values that are not finite.
        """
        for found in self._found:
            status.add_(found)
        self._found.clear()
        if self.error is not None:
            status.fill_(math.nan if isinstance(self.error, SharedFault) else EXCEPTION)

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Raise a `SharedFault` if a status reports a fault, with the held exception as its cause."""
        raise_shared(statuses, values, self.error)

    @contextmanager
    def apart(self, exchange: Exchange) -> Iterator[LocalFault]:
        """The faults of what the owners that `exchange` connects compute apart from the others, if there are others.

        They are raised where they occur, or at these owners' next exchange, and held here.

        >>> from types import SimpleNamespace
        >>> everyone, some = SimpleNamespace(world_size=4), SimpleNamespace(world_size=2, rank=1)
        >>> fault, statuses = LocalFault(everyone), torch.zeros(4)
        >>> with fault.apart(some) as theirs:
        ...     theirs.raise_shared(torch.tensor([0.0, math.nan]), "activities")  # held
        >>> fault.mark(statuses[3])
        >>> statuses
        tensor([0., 0., 0., nan])
        """
        if exchange.world_size == self._exchange.world_size:
            yield self
            return
        inner = self._inner(exchange)
        with self:
            try:
                yield inner
            except SharedFault as fault:
                if inner.error is None and exchange.rank in fault.ranks:
                    raise  # else another owner reports it, or this one its exception
            finally:
                self.error = self.error or inner.error

    def _inner(self, exchange: Exchange) -> LocalFault:
        return LocalFault(exchange)

    def settle(self) -> Tensor | None:
        """After the last exchange: whether no fault was recorded, bool on the device; None if faults are raised."""
        return None


def status_of(*values: Tensor) -> Tensor:
    """The status [1] of some tensors: 0 if all values are finite, else NaN. It copies nothing and waits for no device.

    >>> status_of(torch.ones(3), torch.tensor([1.0, float("inf")]))
    tensor([nan])
    """
    extremes = [extreme for tensor in values if tensor.numel() for extreme in tensor.aminmax()]
    return torch.stack(extremes).mul_(0.0).sum(dim=0, keepdim=True)


def raise_shared(statuses: Tensor, values: str, cause: Exception | None = None) -> None:
    """Raise an error if the status of an owner reports a fault.

    Parameters
    ----------
    statuses: [G, …], one or more numbers of every owner.
    values: name of the values that are not finite if a status is NaN or +inf, for the message.
    cause: the exception of this owner, if any.

    Raises
    ------
    SharedFault
        Some owner has an exception, or else "non-finite {values}"; with the ranks that reported it.

    >>> raise_shared(torch.tensor([0.0, float("nan")]), "activities")
    Traceback (most recent call last):
    simmatch.sharding.faults.SharedFault: non-finite activities on rank 1
    """
    if math.isfinite(float(statuses.sum())):  # a sum is finite only if all its terms are
        return
    statuses = statuses.reshape(len(statuses), -1)
    for kind, reported in (("exception", statuses == EXCEPTION), (f"non-finite {values}", ~statuses.isfinite())):
        ranks = torch.nonzero(reported.any(dim=1)).flatten().tolist()
        if ranks:
            raise SharedFault(kind, ranks) from cause
