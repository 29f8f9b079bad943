"""Which process makes an attempt at a run, and whether it still does."""

from __future__ import annotations

import getpass
import os
import time
from contextlib import suppress
from pathlib import Path

from pydantic import ConfigDict

from simmatch.config import Frozen, NonNegativeInt
from simmatch.documents import shortened


class Holder(Frozen):
    """Who makes an attempt."""

    model_config = ConfigDict(extra="ignore")  # later versions may add fields

    host: str
    pid: NonNegativeInt
    user: str = ""
    job: str = ""
    """Of Ray's jobs API; empty outside one."""
    since: str = ""
    """When it began, by its own clock: for people only, no clocks are compared."""
    machine: str = ""
    """This start of the host, and the process namespace in which `pid` counts; empty if unknown."""
    process: str = ""
    """When the process began, in its host's own count; tells it from a later one of the same `pid`."""

    @classmethod
    def here(cls, job: str = "") -> Holder:
        """Of this process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        host, pid = os.uname().nodename, os.getpid()
        return cls(host=host, pid=pid, user=user_name(), job=job, since=since, machine=machine(), process=begun(pid))

    def ended(self) -> bool:
        """Whether it is known to have ended, as a process of this machine or an earlier job of this one."""
        if not self.machine or self.machine != machine():
            return False
        found = begun(self.pid)
        try:
            if not found:
                os.kill(self.pid, 0)
        except PermissionError:  # another user's, which the system hides (hidepid)
            return False
        except ProcessLookupError:
            pass
        return self.pid == os.getpid() or found != self.process

    def __str__(self) -> str:
        who = f"{self.user}, " if self.user else ""
        job = f", job {self.job}" if self.job else ""
        return shortened(f"{who}process {self.pid} on {self.host}{job}, since {self.since}")


def machine() -> str:
    """This start of this host, and the namespace of its process ids; empty where the system does not say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def begun(pid: int) -> str:
    """When a process of this machine began, in clock ticks; empty if there is none, or it has ended."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def user_name() -> str:
    """Of who runs this process; empty if unknown."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id need not have a name
        return ""
