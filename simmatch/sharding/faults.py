"""Faults of one owner, raised by all owners at the same exchange.

Every exchange after which a fault can be raised includes one number of each owner, the status:

    finite        no fault
    −inf          the owner has an exception
    NaN or +inf   the owner has values that are not finite

Where possible, the status is a nonnegative quantity that is exchanged anyway, such as a largest magnitude; otherwise it
is 0 if there is no fault. All owners read the same bytes, so either all raise an error or none.

To raise an error the host has to wait for the device. There are two modes, with one interface:

    LocalFault      raises at the exchange: nothing is computed after it
    RecordedFault   an update continues, and changes nothing if some status reported a fault; its statuses remain
                    on the device (`FaultRecord`), until all owners read them and raise the same error
"""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor

from simmatch.sharding.exchange import IDENTITY, Exchange

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
        names = ", ".join(str(rank) for rank in ranks)
        when = "" if update is None else f" in update {update}"
        super().__init__(f"{kind} on rank{'s' if len(ranks) > 1 else ''} {names}{when}")

    def __reduce__(self) -> tuple[type[SharedFault], tuple[str, list[int], int | None]]:
        return type(self), (self.kind, self.ranks, self.update)


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
        self._alone = exchange.world_size == 1
        self.error: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._alone or not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def mark(self, status: Tensor) -> None:
        """Write the fault, if there is one, into this owner's status.

        A held `SharedFault` comes from columns that this owner solved alone, and means values that are not finite.
        """
        if self.error is not None:
            status.fill_(math.nan if isinstance(self.error, SharedFault) else EXCEPTION)

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Raise a `SharedFault` if a status reports a fault, with the held exception as its cause."""
        raise_shared(statuses, values, self.error)

    def alone(self) -> LocalFault:
        """Faults of what this owner computes alone: they are raised where they occur, inside `with fault`."""
        return LocalFault(IDENTITY)

    def settle(self) -> Tensor | None:
        """After the last exchange: whether no fault was recorded, bool on the device; None if faults are raised."""
        return None


class FaultRecord:
    """The statuses of the first update with a fault, on the device of a layer.

    Attributes
    ----------
    ok: bool, 0-d: False from that update on.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> record = FaultRecord(torch.device("cpu"))
    >>> for status in (0.0, float("nan"), 0.0):
    ...     fault = RecordedFault(IDENTITY, record)
    ...     fault.raise_shared(torch.tensor([status]), "activities")  # recorded, not raised
    ...     fault.settle()
    tensor(True)
    tensor(False)
    tensor(False)
    >>> record.raise_first(updates=1)
    Traceback (most recent call last):
    simmatch.sharding.faults.SharedFault: non-finite activities on rank 0 in update 2
    """

    def __init__(self, device: torch.device) -> None:
        self.ok = torch.ones((), dtype=torch.bool, device=device)
        self._statuses: Tensor | None = None
        self._values: list[str] = []
        self.error: Exception | None = None

    def add(self, stages: list[tuple[Tensor, str]], error: Exception | None) -> None:
        """Record the statuses [G, 2] of the stages of an update, each with the name of its values."""
        statuses = torch.stack([status for status, _ in stages])
        if self._statuses is None:
            self._statuses, self._values = statuses.clone(), [values for _, values in stages]
        torch.where(self.ok, statuses, self._statuses, out=self._statuses)
        self.ok.logical_and_((statuses * 0.0).sum() == 0.0)
        self.error = self.error or error

    def raise_first(self, updates: int | Tensor) -> None:
        """Raise the error of the first update with a fault, if there is one; this waits for the device.

        Parameters
        ----------
        updates: number of updates without a fault.

        Raises
        ------
        SharedFault
            As it would have been raised at the exchange, with the number of the update. The record is then empty again.
        """
        if self._statuses is None or bool(self.ok):
            return
        statuses, error, self.error = self._statuses.cpu(), self.error, None
        self.ok.fill_(True)
        for stage, values in zip(statuses, self._values, strict=True):
            try:
                raise_shared(stage, values, error)
            except SharedFault as fault:
                raise SharedFault(fault.kind, fault.ranks, int(updates) + 1) from error


class RecordedFault(LocalFault):
    """Faults of one update, recorded instead of raised; see this module.

    The exception of an owner is held until the next exchange too, and that of a single owner raised where it occurs.

    Parameters
    ----------
    exchange: connects to the other owners.
    record: of the layer.
    """

    recorded = True

    def __init__(self, exchange: Exchange, record: FaultRecord) -> None:
        super().__init__(exchange)
        self._record = record
        self._stages: list[tuple[Tensor, str]] = []
        self._own: list[Tensor] = []

    def mark(self, status: Tensor) -> None:
        """Write what this owner has found, alone, into its status."""
        for own in self._own:
            status.add_(own)
        self._own.clear()
        super().mark(status)

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Record the statuses of one exchange: the least and the greatest of every owner."""
        self._stages.append((torch.stack(statuses.reshape(len(statuses), -1).aminmax(dim=1), dim=1), values))

    def alone(self) -> LocalFault:
        return self if self._alone else OwnFault(self._own)

    def settle(self) -> Tensor:
        self._record.add(self._stages, self.error)
        return self._record.ok


class OwnFault(LocalFault):
    """What an owner finds in its own columns, collected for its status at the next exchange with the others."""

    recorded = True

    def __init__(self, collected: list[Tensor]) -> None:
        super().__init__(IDENTITY)
        self._collected = collected

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        self._collected.append(status_of(statuses))


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
    if bool(statuses.isfinite().all()):
        return
    statuses = statuses.reshape(len(statuses), -1)
    for kind, reported in (("exception", statuses == EXCEPTION), (f"non-finite {values}", ~statuses.isfinite())):
        ranks = torch.nonzero(reported.any(dim=1)).flatten().tolist()
        if ranks:
            raise SharedFault(kind, ranks) from cause
