"""How many ranks the nodes of a Ray cluster have room for, and what they lack."""

from __future__ import annotations

from typing import Any

from cluster.config import RunConfig
from cluster.text import count
from simmatch.documents import listed

MOST_NAMED = 3
"""Nodes that are gone, in one message."""

MOST_HELD = 8
"""Nodes that there are, in one message."""


def needs_of(config: RunConfig) -> dict[str, float]:
    """What Ray reserves for a rank."""
    needs = {"CPU": float(config.cluster.cpus_per_rank)}
    if config.device == "cuda":
        needs["GPU"] = 1.0  # one whole GPU: nccl refuses to share one between ranks
    return needs


def room_for(bundle: dict[str, float], free: dict[str, float], nodes: list[dict[str, Any]]) -> int:
    """How many bundles the nodes that are alive have room for: at most what is free in the cluster, node by node."""
    on_nodes = sum(fitting(bundle, node["Resources"]) for node in nodes if node["Alive"])
    return min(on_nodes, fitting(bundle, free))


def fitting(bundle: dict[str, float], resources: dict[str, float]) -> int:
    """How many bundles fit into these resources."""
    return min(int(resources.get(kind, 0.0) // amount) for kind, amount in bundle.items())


def shortage(bundle: dict[str, float], ranks: int, nodes: list[dict[str, Any]]) -> str:
    """What the cluster has and lacks, for a message.

    >>> node = {"Alive": True, "NodeManagerAddress": "10.0.0.7", "Resources": {"CPU": 3.0}}
    >>> shortage({"CPU": 2.0}, 2, [node, {"Alive": False, "NodeManagerAddress": "10.0.0.8", "Resources": {}}])
    'nodes: 10.0.0.7 with 3 CPU; gone: 10.0.0.8; 1 rank more than there is room for'
    """
    alive = [node for node in nodes if node["Alive"]]
    held = [
        f"{node['NodeManagerAddress']} with "
        + " and ".join(f"{node['Resources'].get(kind, 0.0):g} {kind}" for kind in bundle)
        for node in alive
    ]
    # Ray lists every node that there ever was
    gone = sorted({node["NodeManagerAddress"] for node in nodes} - {node["NodeManagerAddress"] for node in alive})
    parts = [f"nodes: {listed(held, MOST_HELD) or 'none'}"]
    if gone:
        parts.append(f"gone: {listed(gone, MOST_NAMED)}")
    lacking = ranks - sum(fitting(bundle, node["Resources"]) for node in alive)
    if lacking > 0:
        parts.append(f"{count(lacking, 'rank')} more than there is room for")
    return "; ".join(parts)
