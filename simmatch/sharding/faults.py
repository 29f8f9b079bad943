"""How a failure of one owner is raised by all owners, at the same exchange.

Every exchange that can fail carries one number of each owner among what it sends, the owner's status:

    finite        all is well
    −inf          the owner met an exception
    NaN or +inf   its values are not finite

Statuses are quantities that cannot be negative where all is well, such as a largest magnitude or a product of
nonnegative numbers, so they cost nothing to send; elsewhere 0 stands for "well". All owners read the same bytes, so all
raise, or none.
"""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor

from simmatch.sharding.exchange import Exchange

EXCEPTION = -math.inf
"""Status of an owner that met an exception."""


class SharedFault(RuntimeError):
    """Something went wrong on at least one owner; raised by all owners at the same exchange.

    Attributes
    ----------
    kind: what went wrong.
    ranks: the owners that reported it.
    """

    def __init__(self, kind: str, ranks: list[int]) -> None:
        self.kind, self.ranks = kind, ranks
        names = ", ".join(str(rank) for rank in ranks)
        super().__init__(f"{kind} on rank{'s' if len(ranks) > 1 else ''} {names}")

    def __reduce__(self) -> tuple[type[SharedFault], tuple[str, list[int]]]:
        return type(self), (self.kind, self.ranks)


class LocalFault:
    """Holds this owner's exception until the next exchange, at which all owners raise.

        fault = LocalFault(exchange)
        with fault:
            gathered[rank] = …               # an exception here is held
        fault.mark(statuses[rank])
        exchange.all_gather(…).wait()
        fault.raise_shared(statuses, "activities")

    The owner of all channels holds nothing: its exceptions are raised where they occur.
    """

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
        """Write the exception that is held, if any, into this owner's status.

        Where an owner solves its columns alone, the `SharedFault` that it meets means values that are not finite.
        """
        if self.error is not None:
            status.fill_(math.nan if isinstance(self.error, SharedFault) else EXCEPTION)

    def raise_shared(self, statuses: Tensor, values: str) -> None:
        """Raise on all owners what their statuses report, see `raise_shared`; the held exception is its cause."""
        raise_shared(statuses, values, self.error)


def status_of(*values: Tensor) -> Tensor:
    """[1]: 0 if all values are finite, else NaN. One pass that copies nothing and waits for no device."""
    extremes = [extreme for tensor in values if tensor.numel() for extreme in tensor.aminmax()]
    return torch.stack(extremes).mul_(0.0).sum(dim=0, keepdim=True)


def raise_shared(statuses: Tensor, values: str, cause: Exception | None = None) -> None:
    """Raise what the owners' statuses report.

    Parameters
    ----------
    statuses: [G, …], one or more numbers of every owner.
    values: what is not finite where a status is not.
    cause: this owner's own exception, if any.

    Raises
    ------
    SharedFault
        "exception" before "non-finite {values}", with the ranks that reported it.
    """
    if bool(statuses.isfinite().all()):
        return
    statuses = statuses.reshape(len(statuses), -1)
    for kind, reported in (("exception", statuses == EXCEPTION), (f"non-finite {values}", ~statuses.isfinite())):
        ranks = torch.nonzero(reported.any(dim=1)).flatten().tolist()
        if ranks:
            raise SharedFault(kind, ranks) from cause
