"""What the control groups of this process allow: inside a container or pod, a machine looks larger than its share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def limits(controller: str, read: Callable[[Path, bool], float], root: Path = ROOT) -> Iterator[float]:
    """The limit that each control group (cgroup v2 or v1) of this process sets, and those above it.

    Parameters
    ----------
    controller: `cpu` or `memory`.
    read: (folder of a group, whether it is of version 2) → its limit; OSError or ValueError where it sets none.
    root: where `proc` and `sys` are mounted.

    >>> list(limits("cpu", cpu_quota, Path("/no such system")))
    []
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no such thing on this system
        return
    for controllers, name in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        mount = root / "sys/fs/cgroup" / controllers  # v2 names no controllers
        if controllers and controller not in controllers.split(","):
            continue
        # inside a container the name may be the host's, and what limits the container lies at the mount itself
        folder = mount / os.path.normpath(name).lstrip("/")
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield read(group, not controllers)
            if group == mount:
                break


def cpu_quota(folder: Path, v2: bool) -> float:
    """CPUs that one control group allows. Raises OSError or ValueError where it sets no limit.

    >>> cpu_quota(Path("/no such group"), True)
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: '/no such group/cpu.max'
    """
    if v2:
        quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" where there is no limit
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) < 0:
        raise ValueError("no limit")
    return int(quota) / int(period)


def memory_limit(folder: Path, v2: bool) -> float:
    """Bytes of memory that one control group allows. Raises OSError or ValueError where it sets no limit.

    >>> memory_limit(Path("/no such group"), True)
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: '/no such group/memory.max'
    """
    return int((folder / ("memory.max" if v2 else "memory.limit_in_bytes")).read_text())  # v2: "max" is no limit
