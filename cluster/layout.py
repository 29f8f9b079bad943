"""Which ranks are on which node, with what they may use there; and what of a cluster they leave idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.allocation import Allocation
from cluster.config import RunConfig
from cluster.text import count, size, spans
from simmatch.config import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Where a rank runs.

    Attributes
    ----------
    pid: of its process; 0 where there is none yet.
    allocation: what its process may use of its node.
    node: id of its Ray node.
    run_dir_error: why it cannot use the run directory, see `cluster.shared_folder`; empty where it can.
    device_error: why it cannot use the run's device; empty where it can.
    """

    rank: int
    pid: int
    allocation: Allocation
    run_dir_error: str = ""
    device_error: str = ""
    node: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.allocation.host})"


def layout_lines(ranks: Sequence[RankInfo]) -> list[str]:
    """A line for every node: its ranks, name and address, GPUs, CPUs, memory, interface, and the ranks' processes."""
    by_node = _by_node(ranks)
    return [_line(on_node, several=len(by_node) > 1) for on_node in by_node.values()]


def _line(on_node: Sequence[RankInfo], *, several: bool) -> str:
    held = on_node[0].allocation
    gpus = [name for rank in on_node for name in rank.allocation.gpus]
    parts = [f"{spans(rank.rank for rank in on_node)} on {held}"]
    if gpus:
        numbers = spans(map(int, gpus)) if all(map(str.isdecimal, gpus)) else ", ".join(gpus)
        parts.append(f"GPU{'s' if len(gpus) > 1 else ''} {numbers}")
    parts += [held.of_cpus, size(held.memory_bytes)]
    if several and held.interface:
        parts.append(held.interface)
    parts += [f"{library} uses {what}" for library, what in held.chosen.items()]
    pids = [str(rank.pid) for rank in on_node if rank.pid]
    if pids:
        parts.append(f"pid{'s' if len(pids) > 1 else ''} {', '.join(pids)}")
    return ", ".join(parts)


def threads_per_rank(ranks: Sequence[RankInfo]) -> int:
    """Threads for every rank: the CPUs per rank of the node that has the fewest."""
    return min(_fitting_threads(_cpus(on_node), len(on_node)) for on_node in _by_node(ranks).values())


def _fitting_threads(held: Allocation, ranks: int) -> int:
    """Threads of each rank of a node, so that they share no CPU; at least 1."""
    return max(1, held.cpus // ranks)


def too_few_cpus(held: Allocation, ranks: int, threads: int) -> tuple[str, str] | None:
    """That a node allows fewer CPUs than its ranks have threads, and what mends it; None where it does not.

    It is told and not refused, whatever `reduce` is: as many threads give the same bits on fewer CPUs, and a run that
    begins or goes on elsewhere, to be compared bit by bit, needs just that.

    >>> too_few_cpus(Allocation("a", "10.0.0.1", cpus=6), ranks=2, threads=4)
    ('fewer than cluster.threads_per_rank=4 for each: slower, same bits', 'cluster.threads_per_rank=3 for a new run')
    """
    if held.cpus >= ranks * threads:
        return None
    fitting = _fitting_threads(held, ranks)
    fewer_ranks = "fewer ranks on a node (cluster.cpus_per_rank)"
    fix = f"cluster.threads_per_rank={fitting} for a new run" if fitting < threads else fewer_ranks
    return f"fewer than cluster.threads_per_rank={threads} for each: slower, same bits", fix


def oversubscribed(ranks: Sequence[RankInfo], threads: int) -> list[str]:
    """A line for every node that allows fewer CPUs than its ranks have threads."""
    lines = []
    for on_node in _by_node(ranks).values():
        held = _cpus(on_node)
        found = too_few_cpus(held, len(on_node), threads)
        if found is not None:
            lines.append(f"{held}: {held.of_cpus} for {count(len(on_node), 'rank')}, {found[0]}; {found[1]}")
    return lines


def idle_gpus(config: RunConfig, free: int) -> str | None:
    """A line about GPUs that nobody uses, and which mesh would use them; None where there are none, or no such mesh.

    free: GPUs of the cluster that neither this run nor another job has.
    """
    mesh, used = config.mesh, config.mesh.world_size
    if free <= 0:
        return None
    if config.device != "cuda":
        return f"device: {config.device} leaves {count(free, 'GPU')} idle; device: cuda gives one to every rank"
    larger = []
    for axis in ("data", "channel"):
        extent = (used + free) // (used // getattr(mesh, axis))
        try:
            other = mesh.model_copy(update={axis: extent})
            other.check(config.model)
        except ConfigError:
            continue
        if other.world_size > used:
            larger.append((f"mesh.{axis}: {extent}", other.world_size))
    if not larger:
        return None
    every = all(ranks == used + free for _, ranks in larger)
    would = " or ".join(text if every else f"{text} ({ranks} GPUs)" for text, ranks in larger)
    verb, them = ("is", "it") if free == 1 else ("are", "them")
    return f"mesh: {mesh}; {count(free, 'GPU')} {verb} idle; {would} would use {them if every else 'more'}"


def _by_node(ranks: Sequence[RankInfo]) -> dict[str, list[RankInfo]]:
    """Name and address of a node → its ranks."""
    found: dict[str, list[RankInfo]] = {}
    for rank in ranks:
        found.setdefault(str(rank.allocation), []).append(rank)
    return found


def _cpus(on_node: Sequence[RankInfo]) -> Allocation:
    """The least that a rank of the node may use."""
    return min((rank.allocation for rank in on_node), key=lambda allocation: allocation.cpus)
