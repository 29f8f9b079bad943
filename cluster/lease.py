"""A lease says that an attempt is at work, so that another one waits or ends early; `cluster.fence` is what protects.

RUN_DIR/lease.json is renewed every few seconds and removed at the end. Clocks of two machines are never compared: who
finds the lease of another machine watches whether it changes. On one machine the process is looked up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cluster.fence import AttemptLostError, Commits, Fence
from cluster.holder import Holder, machine
from cluster.storage import AnyPath, read_as, remove, write_whole
from simmatch.config import Frozen, NonNegativeFloat, NonNegativeInt
from simmatch.documents import dump_json

LEASE = "lease.json"
RENEW_S = 10.0
EXPIRE_S = 60.0
"""A lease that nobody renews for so long has ended."""
LOOK_S = 1.0
"""Between two looks at the lease of another machine."""


class RunBusyError(RuntimeError):
    """Another attempt is at work in the run directory; the message says who."""


class Lease(Frozen):
    """What the file holds. `attempt` as in `cluster.fence.Entry`."""

    attempt: NonNegativeInt
    renewals: NonNegativeInt = 0
    uptime_s: NonNegativeFloat = 0.0
    """Of the holder's machine, at the latest renewal, less the time it was asleep; means something there only."""


class LeaseKeeper:
    """Renews an attempt's lease in a thread of its own, until `release`, or until the attempt has lost the run.

    A store that does not answer is asked again at the next renewal.
    """

    def __init__(self, run_dir: AnyPath, fence: Fence) -> None:
        self._path, self._fence = run_dir / LEASE, fence
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write the lease and keep it."""
        self._renew(0)
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """The attempt is over: others need not wait. A store that does not answer keeps the lease, which expires."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join(RENEW_S)
        with suppress(OSError, AttemptLostError):
            self._fence.check()
            remove(self._path)

    def _run(self) -> None:
        renewals = 0
        with suppress(AttemptLostError):
            while not self._released.wait(RENEW_S):
                renewals += 1
                self._renew(renewals)

    def _renew(self, renewals: int) -> None:
        self._fence.check()
        lease = Lease(attempt=self._fence.attempt, renewals=renewals, uptime_s=time.monotonic())
        with suppress(OSError):
            write_whole(self._path, dump_json(lease.model_dump(mode="json")))


def wait_for_holder(run_dir: AnyPath, tell: Callable[[str], None]) -> int | None:
    """Wait until no attempt is at work in a run directory; returns the number of its newest entry, or None where an
    attempt has ended meanwhile, so that what it has left is to be looked at again.

    An attempt of another machine gets `EXPIRE_S` to end, or to show that it lives; so does one that has recorded its
    end and is bringing its last records.

    tell: shows a line.

    Raises
    ------
    RunBusyError
        It goes on.
    OSError
        The disk, or the object store, does not answer.
    """
    commits = Commits(run_dir)
    number, entry = commits.newest()
    lease = None if entry is None else _read(run_dir, entry.attempt)
    if entry is None or (entry.kind == "end" and lease is None) or entry.holder.ended():
        return number
    holder = entry.holder
    if entry.kind != "end" and lease is not None and holder.machine and holder.machine == machine():
        silent_s = time.monotonic() - lease.uptime_s
        if silent_s < EXPIRE_S:
            raise RunBusyError(_busy(run_dir, holder))
        tell(f"{run_dir}: taking over from an attempt that has given no sign of life for {silent_s:.0f} s: {holder}")
        return number
    tell(f"{run_dir}: waiting at most {2 * EXPIRE_S:g} s for an earlier attempt to end: {holder}")
    started_s = changed_s = time.monotonic()
    while True:
        time.sleep(LOOK_S)
        looked_s = time.monotonic()  # before the look: this process may have been frozen until now
        found, (newest, latest) = _read(run_dir, entry.attempt), commits.newest()
        released = found is None and lease is not None
        if released or latest is None or latest.attempt != entry.attempt:
            return None
        if (found, newest) != (lease, number):
            lease, number, changed_s = found, newest, looked_s
            if changed_s - started_s >= EXPIRE_S:
                raise RunBusyError(_busy(run_dir, holder))
        elif looked_s - changed_s >= EXPIRE_S:
            return number


def _busy(run_dir: AnyPath, holder: Holder) -> str:
    return f"another attempt works in {run_dir}: {holder}"


def _read(run_dir: AnyPath, attempt: int) -> Lease | None:
    """The lease of this attempt; None if it has none."""
    lease = read_as(Lease, run_dir / LEASE)
    return None if lease is None or lease.attempt != attempt else lease
