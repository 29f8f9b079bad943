"""How many CPUs a process may use, and its threads."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from simmatch.control_groups import ROOT, cpu_quota, limits


def allowed_cpus(root: Path = ROOT) -> int:
    """Whole CPUs that this process may use, by its affinity and its control groups' quotas; at least 1.

    A container or pod with 4 of 64 CPUs sees all 64 in `os.cpu_count`.

    root: where `proc` and `sys` are mounted.
    """
    return cpu_limit(root)[0]


def cpu_limit(root: Path = ROOT) -> tuple[int, str]:
    """As `allowed_cpus`, and what sets that limit: `control group`, `affinity`, or nothing ("") but the machine."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quota = min(limits("cpu", cpu_quota, root), default=math.inf)
    limited_by = "control group" if quota < affinity else "affinity" if affinity < machine else ""
    return max(1, int(min(affinity, quota))), limited_by


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
