"""What an error means for a run: `classify` tells losses, after which a new group may fare better, from faults.

A loss is a rank, a node or a link that is gone: Ray says so by type, gloo, nccl and torch's store by type and text. A
fault would happen again: a configuration, a program, memory that does not suffice. In doubt it is a fault, since a
wrong restart costs more than a clear end.
"""

from __future__ import annotations

import errno

import torch
import torch.distributed as dist

from cluster.checkpoints.manifest import DamagedError
from cluster.collectives import PeerTimeout
from cluster.policy import Failure
from cluster.storage import StorageError

LOST_IN_RAY = frozenset(
    {
        "RayActorError",  # ActorDiedError, ActorUnavailableError
        "WorkerCrashedError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "ObjectLostError",  # OwnerDiedError and all others of its kind
        "GetTimeoutError",
        "RpcError",
        "RaySystemError",
        "OutOfMemoryError",  # of a machine, whose largest process Ray has killed: perhaps not by our doing
        "OutOfDiskError",
        "ObjectStoreFullError",
        "ActorPlacementGroupRemoved",
        "TaskPlacementGroupRemoved",
        "ActorUnschedulableError",
        "TaskUnschedulableError",
    }
)
"""Ray's errors, by name so that a rank without Ray need not import it; what derives from them counts as they do."""

LOST_ERRNOS = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ESTALE,
        errno.EIO,  # a disk that dies
    }
)

LOST_TEXTS = (
    "connection reset by peer",
    "connection closed by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "socket timeout",
    "timed out",
    "wait timeout",
    "connect timeout",
    "caused pair closure",
    "collective operation timeout",
    "network is unreachable",
    "no route to host",
    "software caused connection abort",
    "ncclremoteerror",
    "ncclsystemerror",
    "remote process exited",
    # a device that is broken or gone
    "ecc error",
    "nvlink",
    "fallen off the bus",
    "device unavailable",
    "devices unavailable",
)
"""In the text, in lower case, of a RuntimeError: gloo and CUDA have no types for these."""

FAULT_TEXTS = ("ncclinvalidusage", "ncclinvalidargument", "invalidauthtoken")
"""In the text of what is a loss by its type."""


def classify(error: BaseException) -> Failure:
    """What an error, with those that it was raised from, means for the run. The message is one line.

    >>> classify(ConnectionResetError("by peer"))
    Failure(message='ConnectionResetError: by peer', retryable=True, fits=None, diverged=False)
    >>> classify(KeyError("lr")).retryable
    False
    """
    ray = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "ray.exceptions"}
    cause = getattr(error, "cause", None)
    if "RayTaskError" in ray and isinstance(cause, BaseException):
        return classify(cause)  # what the actor's own code has raised
    if "RayTaskError" in ray or getattr(error, "actor_init_failed", False):
        # a program that cannot be loaded on its node, or fails before it is asked for anything: so would the next
        return Failure(_last_line(error), retryable=False)
    if ray:
        return Failure(_sentence(error), retryable=bool(ray & LOST_IN_RAY) and not _is_fault(error))
    diverged = bool(getattr(error, "diverged", False))
    return Failure(_sentence(error), retryable=not diverged and any(map(_is_loss, _chain(error))), diverged=diverged)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those it was raised from, each once."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _is_loss(error: BaseException) -> bool:
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or _is_fault(error):
        return False
    if isinstance(error, DamagedError | StorageError):
        return True  # a new group looks again for what can be read
    if isinstance(error, PeerTimeout | dist.DistNetworkError | dist.DistStoreError | dist.DistBackendError):
        return True
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in LOST_ERRNOS
    return isinstance(error, RuntimeError) and any(lost in text for lost in LOST_TEXTS)


def _is_fault(error: BaseException) -> bool:
    text = str(error).lower()
    return any(fault in text for fault in FAULT_TEXTS)


def _sentence(error: BaseException) -> str:
    """Type and text in one line; Ray's indented particulars (class, actor id) are left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(("\t", "  "))]
    if isinstance(error, PeerTimeout):
        return lines[0]  # names its rank and says what it waited for
    text = " ".join(lines).partition(" Some common causes include")[0]  # Ray's guesses
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_line(error: BaseException) -> str:
    """Of a traceback as text, where the error stands."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
