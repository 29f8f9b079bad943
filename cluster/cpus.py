"""How many CPUs a process may use, and how the ranks of a group share those of their hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cluster.worker import Place


def allowed_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: of its affinity and of its control groups' quotas, whole ones, at least 1.

    A container or pod that is given 4 of 64 CPUs sees all 64 in `os.cpu_count`.

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
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield _quota(place, v2=not controllers)
            if place == mount:
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


def threads_per_rank(places: Sequence[Place]) -> int:
    """Threads for every rank: the CPUs of the host that has fewest for each of its ranks."""
    return max(1, min(cpus // ranks for cpus, ranks in _hosts(places).values()))


def too_few(places: Sequence[Place], threads: int) -> list[str]:
    """A line for every host that allows fewer CPUs than its ranks have threads."""
    return [
        f"{host} allows {cpus} CPUs, fewer than cluster.threads_per_rank={threads} for {ranks} ranks: slower, same bits"
        for host, (cpus, ranks) in _hosts(places).items()
        if cpus < ranks * threads
    ]


def _hosts(places: Sequence[Place]) -> dict[str, tuple[int, int]]:
    """Host → its CPUs and its ranks."""
    found: dict[str, tuple[int, int]] = {}
    for place in places:
        cpus, ranks = found.get(f"{place.host} ({place.address})", (place.cpus, 0))
        found[f"{place.host} ({place.address})"] = min(cpus, place.cpus), ranks + 1
    return found


@contextmanager
def all_cpus() -> Iterator[None]:
    """Every CPU that this process may use, for work whose last bits nothing depends on."""
    from threadpoolctl import threadpool_limits

    before, count = torch.get_num_threads(), allowed_cpus()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
