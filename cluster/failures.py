"""Why a group cannot go on: `classify` reads one error, `group_failure` the status of all ranks.

A failure is retryable where a rank, a node or a link is gone: Ray reports it by type, gloo, nccl and torch's store by
type and text. So is an error of a GPU after which its process can no longer use it: a new group has new processes. Any
other would happen again: a configuration, a program, memory that does not suffice. What is unknown counts as one of
these, since a wrong restart costs more than a clear end.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from cluster.checkpoints.manifest import DamagedError
from cluster.collectives import PeerTimeout
from cluster.messages import RankStatus
from cluster.policy import Failure
from cluster.waiting import PART_OF_WAIT, Cause, cause_of, last
from simmatch.chunks import ChunkLost
from simmatch.memory import OutOfMemory
from simmatch.remote import StorageError
from simmatch.sharding.faults import SharedFault, named

RETRYABLE_IN_RAY = frozenset(
    {
        "RayActorError",  # ActorDiedError, ActorUnavailableError
        "WorkerCrashedError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "ObjectLostError",  # OwnerDiedError and all others of its kind
        "GetTimeoutError",
        "RpcError",
        "RaySystemError",
        "OutOfMemoryError",  # of a machine: Ray has killed its largest process, which need not be the cause
        "OutOfDiskError",
        "ObjectStoreFullError",
        "ActorPlacementGroupRemoved",
        "TaskPlacementGroupRemoved",
        "ActorUnschedulableError",
        "TaskUnschedulableError",
    }
)
"""Ray's errors with their subclasses, by name so that a rank need not import Ray."""

RETRYABLE_ERRNOS = frozenset(
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

RETRYABLE_TEXTS = (
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
    "busy or unavailable",
    # a device that this process can no longer use
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "cuda error: unknown error",
    "status_execution_failed",
)
"""Parts of the lower-case text of a RuntimeError: gloo has no types for these, and torch one type for all of CUDA's."""

ADVICE = (" Some common causes include", " CUDA kernel errors might be asynchronously", " Search for `cuda")
"""Where the text of Ray, or of torch, goes on with guesses and general advice."""

TAKEN_AWAY = "the actor's node was terminated expectedly"
"""Ray's word for a node whose Ray was told to end, as by `ray stop` or SIGTERM; what follows is the reason."""

SETTLE_S = 5.0
"""Longest wait for the rank whose exception the others have been told of: it reports its own at about the same time."""

FATAL_TEXTS = ("ncclinvalidusage", "ncclinvalidargument", "invalidauthtoken")
"""Parts of the text of errors whose type is retryable."""


def classify(error: BaseException) -> Failure:
    """What an error, with those it was raised from, means for the run. The message is one line.

    >>> classify(ConnectionResetError("by peer"))
    Failure(message='ConnectionResetError: by peer', retryable=True, fits=None, diverged=False)
    >>> classify(KeyError("lr")).retryable
    False
    """
    ray = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "ray.exceptions"}
    cause = getattr(error, "cause", None)
    if "RayTaskError" in ray and isinstance(cause, BaseException):
        return classify(cause)  # what the actor's own code raised
    if "RayTaskError" in ray or getattr(error, "actor_init_failed", False):
        # a program that cannot be loaded on its node, or whose constructor fails, would fail again
        return Failure(_last_line(error), retryable=False)
    if ray:
        taken = _taken_away(error)
        retryable = bool(ray & RETRYABLE_IN_RAY) and not _is_fatal(error)
        return Failure(_sentence(error) + taken, retryable, preempted=bool(taken))
    chain = _chain(error)
    diverged = bool(getattr(error, "diverged", False))
    retryable = not diverged and any(map(_is_retryable, chain))
    shared = any(isinstance(one, SharedFault) and one.kind == "exception" for one in chain)
    told = shared and isinstance(chain[-1], SharedFault)  # of another rank's; else its own stands behind it
    message = _sentence(error)
    if shared and not told and not isinstance(error, OutOfMemory):
        message += f": {_sentence(chain[-1])}"
    secondary = told or any(map(_is_lost_peer, chain))
    return Failure(message, retryable=retryable, diverged=diverged, secondary=secondary)


def group_failure(statuses: Sequence[RankStatus], stall_timeout_s: float, wait_timeout_s: float) -> Failure | None:
    """Why the group cannot go on, or None while it can. The limits are those of `stalled`."""
    failed = {status.rank: status.failure for status in statuses if status.failure is not None}
    if not failed:
        return stalled(statuses, stall_timeout_s, wait_timeout_s)
    # what a rank did by itself explains what the others report; a fault of the program explains lost peers
    failure = min(failed.values(), key=lambda failure: (failure.secondary, failure.retryable))
    if failure.retryable:
        missing = _missing(statuses, list(failed)) if failure.secondary else ""  # it knows only itself
        return replace(failure, message=f"{missing}: {failure.message}") if missing else failure
    waits = failure.secondary and any(status.failure is None for status in statuses)
    if waits and min(status.idle_s for status in statuses if status.rank in failed) < SETTLE_S:
        return None
    return failure


def stalled(statuses: Sequence[RankStatus], limit_s: float, wait_limit_s: float = math.inf) -> Failure | None:
    """A retryable failure where a rank stands still for too long, else None. A rank that is done does not.

    A rank that has started fewer exchanges of a connection than another is waited for, and may be for `wait_limit_s`:
    `cluster.waiting` finds who holds up the rest. A stage that works may be waited for by its neighbours, and ranks
    that are alone, or all stuck outside of an exchange, may be idle, for `limit_s`.
    """
    running = [status for status in statuses if not status.done]
    for seconds in (wait_limit_s, limit_s):
        waiting = [status.rank for status in running if status.idle_s > seconds]
        cause = cause_of(running, waiting)
        works = cause is not None and cause.is_link and min(one.idle_s for one in cause.ranks) <= PART_OF_WAIT * seconds
        if cause is not None and (not works or seconds == limit_s):
            return Failure(f"{_held_up(cause, waiting)} for {seconds:g} s", retryable=True)
    idle = [status for status in running if status.idle_s > limit_s]
    if not idle:
        return None
    culprits = last(idle) or idle
    where = f"{_position(culprits[0])}, exchange {sum(culprits[0].exchanges.values())}"
    names = named([status.rank for status in culprits])
    return Failure(f"{names}: no progress for {limit_s:g} s ({where})", retryable=True)


def _missing(statuses: Sequence[RankStatus], waiting: Sequence[int]) -> str:
    """For whom some ranks wait, in a sentence; empty where they have started no more exchanges than the others."""
    cause = cause_of(statuses, waiting)
    return "" if cause is None else _held_up(cause, waiting)


def _held_up(cause: Cause, waiting: Sequence[int]) -> str:
    ranks = [status.rank for status in cause.ranks]
    late = [rank for rank in waiting if rank not in ranks]
    have = "has" if len(ranks) == 1 else "have"
    return f"{named(ranks)} {have} not started {cause} ({_position(cause.ranks[0])}), {named(late)} waited for it"


def _position(status: RankStatus) -> str:
    latest = status.progress
    if latest is None:
        return "start"
    layer = "" if latest.layer is None else f"layer {latest.layer}, "
    return f"{layer}{latest.phase} {latest.done}/{latest.total}"


def _taken_away(error: BaseException) -> str:
    """That the node of an actor was ended on purpose, as Ray says it, for a message; empty where it was not."""
    if getattr(error, "preempted", False):
        return "; its node was drained"
    _, found, reason = str(error).partition(TAKEN_AWAY)
    return f"; its node was ended{reason.splitlines()[0]}" if found else ""


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those it was raised from, each once."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _is_retryable(error: BaseException) -> bool:
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or _is_fatal(error):
        return False
    if isinstance(error, OutOfMemory):
        return error.elsewhere  # such as in the process of a rank that is not quite gone; else it would happen again
    if isinstance(error, DamagedError | StorageError | ChunkLost):
        return True  # a new group looks again for a checkpoint, or for encoded images, that can be read
    if isinstance(error, PeerTimeout | dist.DistNetworkError | dist.DistStoreError | dist.DistBackendError):
        return True
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in RETRYABLE_ERRNOS
    return isinstance(error, RuntimeError) and any(part in text for part in RETRYABLE_TEXTS)


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, PeerTimeout | dist.DistBackendError) and not _is_fatal(error)


def _is_fatal(error: BaseException) -> bool:
    text = str(error).lower()
    return any(part in text for part in FATAL_TEXTS)


def _sentence(error: BaseException) -> str:
    """Type and text in one line, without Ray's indented details (class, actor id)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(("\t", "  "))]
    if isinstance(error, PeerTimeout | OutOfMemory):
        return lines[0]  # a sentence
    text = " ".join(lines)
    for advice in ADVICE:
        text = text.partition(advice)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_line(error: BaseException) -> str:
    """The last line of a traceback, which holds the error."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
