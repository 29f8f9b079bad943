"""How many CPUs a process may use, and how the ranks of a group share those of their hosts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cluster.messages import RankInfo
from cluster.text import count


def allowed_cpus(root: Path = Path("/")) -> int:
    """Whole CPUs that this process may use, by its affinity and its control groups' quotas; at least 1.

    A container or pod with 4 of 64 CPUs sees all 64 in `os.cpu_count`.

    root: where `proc` and `sys` are mounted.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs allowed by each control group (cgroup v2 or v1) that this process is in, and by those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no such thing on this system
        return
    for controllers, name in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        mount = root / "sys/fs/cgroup" / controllers  # v2 names no controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        # inside a container the name may be the host's, and what limits the container lies at the mount itself
        folder = mount / os.path.normpath(name).lstrip("/")
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield _quota(group, v2=not controllers)
            if group == mount:
                break


def _quota(folder: Path, *, v2: bool) -> float:
    """CPUs that one control group allows. Raises OSError or ValueError where it sets no limit."""
    if v2:
        quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" where there is no limit
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) < 0:
        raise ValueError("no limit")
    return int(quota) / int(period)


def threads_per_rank(ranks: Sequence[RankInfo]) -> int:
    """Threads for every rank: the CPUs per rank of the host that has the fewest."""
    return max(1, min(cpus // of_host for cpus, of_host in _hosts(ranks).values()))


def oversubscribed(ranks: Sequence[RankInfo], threads: int) -> list[str]:
    """A line for every host that allows fewer CPUs than its ranks have threads."""
    return [
        f"{host} allows {count(cpus, 'CPU')}, fewer than cluster.threads_per_rank={threads} for "
        f"{count(of_host, 'rank')}: slower, same bits"
        for host, (cpus, of_host) in _hosts(ranks).items()
        if cpus < of_host * threads
    ]


def _hosts(ranks: Sequence[RankInfo]) -> dict[str, tuple[int, int]]:
    """Host → its CPUs and how many of the ranks it has."""
    hosts: dict[str, tuple[int, int]] = {}
    for rank in ranks:
        name = f"{rank.host} ({rank.address})"
        cpus, of_host = hosts.get(name, (rank.cpus, 0))
        hosts[name] = min(cpus, rank.cpus), of_host + 1
    return hosts


@contextmanager
def all_cpus() -> Iterator[None]:
    """Use every CPU that this process may use, for work on whose last bits nothing depends."""
    from threadpoolctl import threadpool_limits

    before, count = torch.get_num_threads(), allowed_cpus()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


class ThreadClock:
    """Processor time of the thread that makes it; any thread may read it.

    >>> ThreadClock().seconds != 0.0
    True
    """

    def __init__(self) -> None:
        known = hasattr(time, "pthread_getcpuclockid")  # macOS has none
        self._clock = time.pthread_getcpuclockid(threading.get_ident()) if known else None

    @property
    def seconds(self) -> float | None:
        """What it has used; None where the thread has ended, or the system does not tell."""
        try:
            return None if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # the thread is gone, and its clock with it
            return None
