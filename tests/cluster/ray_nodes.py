"""A Ray cluster of several nodes on this machine, which come and go."""

from __future__ import annotations

import time
from typing import Any

import psutil


class Nodes:
    """A head without room for ranks, and nodes of one CPU each, or as they are asked for."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)

    def add(self, **options: Any) -> Any:
        return self.cluster.add_node(**{"num_cpus": 1} | options)

    def remove_that_of(self, pid: int) -> None:
        """All of a node's processes at once, as when its machine loses power."""
        self.remove(psutil.Process(pid).ppid())

    def remove(self, raylet: int) -> None:
        """The node of this raylet, likewise."""
        (node,) = [node for node in self.cluster.worker_nodes if self.raylet(node) == raylet]
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, pid: int, seconds: float) -> str:
        """Have Ray drain the node of a rank's process, as a cloud does before it takes a machine away; its id."""
        import ray
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        (node,) = [node for node in self.cluster.worker_nodes if self.raylet(node) == psutil.Process(pid).ppid()]
        service = ray._raylet.GcsClient(address=self.cluster.address)
        ends_ms = int(1000 * (time.time() + seconds))
        accepted, why_not = service.drain_node(node.node_id, DRAIN_NODE_REASON_PREEMPTION, "reclaimed", ends_ms)
        assert accepted, why_not
        return str(node.node_id)

    def forget_the_ended(self) -> None:
        """Nodes whose Ray has ended by itself are no longer nodes to be counted."""
        for node in list(self.cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:
                self.cluster.remove_node(node, allow_graceful=False)

    @staticmethod
    def raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    def fill(self, count: int) -> None:
        """As many nodes as there are to be, and known to the head."""
        import ray

        self.forget_the_ended()
        while len(self.cluster.worker_nodes) < count:
            self.add()
        deadline = time.monotonic() + 30
        while ray.cluster_resources().get("CPU", 0) != count:
            assert time.monotonic() < deadline, ray.nodes()
            time.sleep(0.1)
