"""Nodes and processes that are about to go: what is known of them, and in which words.

Ray marks a node as draining when somebody takes it away with notice: a cloud that reclaims it, an autoscaler, `ray
drain-node`, or `ray start --block` that has got SIGTERM, as in a pod that is deleted. Nothing new is placed there, and
the node ends once it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.layout import RankInfo
from simmatch.sharding.faults import named


@dataclass(frozen=True)
class ClusterView:
    """What a group knows of its cluster.

    Attributes
    ----------
    draining: id of every node that Ray drains → when it ends, in Unix time; None: once it is empty.
    own_node: id of the node that the job's driver runs on.
    room: ranks that there is room for beside the group's own; it is kept for them.
    """

    draining: Mapping[str, float | None] = field(default_factory=dict)
    own_node: str = ""
    room: int = 0

    def spare(self, ranks: Sequence[RankInfo]) -> int:
        """Ranks that there is room for beside these, once those on nodes that go have moved."""
        return max(0, self.room - sum(rank.node in self.draining for rank in ranks))


@dataclass(frozen=True)
class Departure:
    """A node, or the process of a rank, that is about to go.

    Attributes
    ----------
    what: for people: the node with its ranks, why it goes, and when.
    at_s: when, in Unix time; None: not known.
    driver: the job's driver goes with it.
    """

    what: str
    at_s: float | None = None
    driver: bool = False


def departures(
    view: ClusterView, ranks: Sequence[RankInfo], terminated: Sequence[int], now_s: float
) -> dict[str, Departure]:
    """What is about to go of a group, by the id of the node, or by the name of a rank where only its process goes.

    terminated: ranks whose processes have got SIGTERM.
    now_s: Unix time.

    >>> from cluster.allocation import Allocation
    >>> held = Allocation("worker-1", "10.0.0.7", cpus=8)
    >>> ranks = [RankInfo(rank, 100 + rank, held, node="ab12") for rank in range(2)]
    >>> departures(ClusterView({"ab12": 130.0, "cd34": None}), ranks, [], now_s=102.0)["ab12"].what
    'node worker-1 (10.0.0.7) with ranks 0, 1 is drained by Ray and ends in 28 s'
    >>> departures(ClusterView(), ranks, [1], now_s=0.0)
    {'rank 1': Departure(what='rank 1 (pid 101 on worker-1) has got SIGTERM', at_s=None, driver=False)}
    """
    found = {}
    for node, at_s in view.draining.items():
        own = [rank for rank in ranks if rank.node == node]
        parts = [named([rank.rank for rank in own])] if own else []
        parts += ["the driver of this job"] if node == view.own_node else []
        if parts:
            which = f"node {own[0].allocation}" if own else "the node"
            when = "has no deadline" if at_s is None else f"ends in {max(0.0, at_s - now_s):.0f} s"
            what = f"{which} with {' and '.join(parts)} is drained by Ray and {when}"
            found[node] = Departure(what, at_s, node == view.own_node)
    for rank in terminated:
        if ranks[rank].node not in found:
            found[f"rank {rank}"] = Departure(f"{ranks[rank]} has got SIGTERM")
    return found
