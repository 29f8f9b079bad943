"""Faults of an update that are recorded on the device, so that the host does not wait for it; see `faults`.

The updates after one with a fault run on, and change nothing. The record keeps the statuses of the first update with a
fault, and all owners have the same. When the host looks, all owners raise the error that was not raised at once.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import LocalFault, SharedFault, raise_shared, status_of


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
        with torch.inference_mode(False):  # so that updates outside of it may write to them too
            self.ok = torch.ones((), dtype=torch.bool, device=device)
        self._statuses: dict[tuple[str, ...], Tensor] = {}
        """By the names of the values of an update: not all need to solve. A captured update writes to one for ever."""
        self.error: Exception | None = None

    def add(self, stages: dict[str, Tensor], error: Exception | None) -> None:
        """Record the statuses [G, 2] of an update by the name of their values."""
        statuses, values = torch.stack(list(stages.values())), tuple(stages)
        if values not in self._statuses:
            with torch.inference_mode(False):
                self._statuses[values] = torch.zeros_like(statuses)
        kept = self._statuses[values]
        kept.copy_(torch.where(self.ok, statuses, kept))  # the layer may be of another dtype now
        self.ok.logical_and_((statuses * 0.0).sum() == 0.0)
        self.error = self.error or error

    def clear(self) -> None:
        """Forget the faults; the device is not waited for."""
        self.error = None
        self.ok.fill_(True)
        for statuses in self._statuses.values():
            statuses.zero_()

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
        if bool(self.ok):
            return
        recorded = {values: statuses.to("cpu", copy=True) for values, statuses in self._statuses.items()}
        error = self.error
        self.clear()
        for stage, values in (pair for names, kept in recorded.items() for pair in zip(kept, names, strict=True)):
            try:
                raise_shared(stage, values)
            except SharedFault as fault:
                cause = error if fault.kind == "exception" else None  # else the error is from a later update
                raise SharedFault(fault.kind, fault.ranks, int(updates) + 1) from cause


class NotRaised(LocalFault):
    """Faults that the host does not wait for: what `RecordedFault` and `OwnFault` have in common.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> NotRaised(IDENTITY).recorded
    True
    """

    recorded = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        held = super().__exit__(kind, error, traceback)
        # capturing moves nothing, so no owner waits; held, the exception would be reported anew at every replay
        return held and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _inner(self, exchange: Exchange) -> LocalFault:
        return OwnFault(exchange, self)


class RecordedFault(NotRaised):
    """Faults of one update, recorded instead of raised; see this module.

    The exception of an owner is held until the next exchange too, and that of a single owner raised where it occurs.

    Parameters
    ----------
    exchange: connects to the other owners.
    record: of the layer.

    >>> from types import SimpleNamespace
    >>> record = FaultRecord(torch.device("cpu"))
    >>> fault, statuses = RecordedFault(SimpleNamespace(world_size=2), record), torch.zeros(2)
    >>> with fault:
    ...     raise OSError("disk full")
    >>> fault.mark(statuses[0])
    >>> fault.raise_shared(statuses, "activities")
    >>> fault.settle()
    tensor(False)
    >>> record.raise_first(updates=6)
    Traceback (most recent call last):
    simmatch.sharding.faults.SharedFault: exception on rank 0 in update 7
    """

    def __init__(self, exchange: Exchange, record: FaultRecord) -> None:
        super().__init__(exchange)
        self._record = record
        self._stages: dict[str, Tensor] = {}

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Record the statuses of one exchange: the least and the greatest of every owner, over all exchanges of such
        values, as the number of tiles depends on the batch."""
        statuses = statuses.reshape(len(statuses), -1)
        if values in self._stages:
            statuses = torch.cat([self._stages[values], statuses], dim=1)
        self._stages[values] = torch.stack(statuses.aminmax(dim=1), dim=1)

    def settle(self) -> Tensor:
        self._record.add(self._stages, self.error)
        return self._record.ok


class OwnFault(NotRaised):
    """What is found apart from the others (`LocalFault.apart`), collected for the next exchange with them.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> outer = LocalFault(IDENTITY)
    >>> OwnFault(IDENTITY, outer).raise_shared(torch.tensor([float("inf")]), "activities")
    >>> status = torch.zeros(1)
    >>> outer.mark(status)
    >>> status
    tensor([nan])
    """

    def __init__(self, exchange: Exchange, outer: LocalFault) -> None:
        super().__init__(exchange)
        self._outer = outer
        self._sound: Tensor | None = None

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Report this owner's status, unless some owner had a fault before: what follows from that is not its own."""
        own, sound = status_of(statuses[self._exchange.rank]), (statuses * 0.0).sum() == 0.0
        if self._sound is not None:
            own, sound = torch.where(self._sound, own, 0.0), self._sound & sound
        self._sound = sound
        self._outer.found(own)


def put(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Write a value into a tensor; if `ok` is given, only where it is true, and without waiting for the device.

    >>> kept = torch.zeros(2)
    >>> put(kept, torch.ones(2), ok=torch.tensor(False))
    >>> kept
    tensor([0., 0.])
    """
    if ok is None:
        target.copy_(value)
    else:
        torch.where(ok, value, target, out=target)
