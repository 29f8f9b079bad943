"""A Ray cluster of several nodes on this machine, which come and go."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import psutil

POD = """
import sys, time

from ray._private.node import Node
from ray._private.parameter import RayParams

Node(
    RayParams(
        gcs_address=sys.argv[1],
        num_cpus=1,
        num_gpus=0,
        node_ip_address="127.0.0.1",
        object_store_memory=150 * 2**20,
        include_log_monitor=False,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
    ),
    head=False,
    shutdown_at_exit=True,
)
while True:
    time.sleep(1.0)
"""
"""What `ray start --block` runs, on a loopback address, which that command refuses."""


def drain(address: str, node: str, seconds: float) -> None:
    """Have Ray drain a node."""
    import ray
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    ends_ms = int(1000 * (time.time() + seconds))
    service = ray._raylet.GcsClient(address=address)
    accepted, why_not = service.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "reclaimed", ends_ms)
    assert accepted, why_not


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
        (node,) = [node for node in self.cluster.worker_nodes if self.raylet(node) == psutil.Process(pid).ppid()]
        drain(self.cluster.address, node.node_id, seconds)
        return str(node.node_id)

    def add_pod(self) -> subprocess.Popen[bytes]:
        """One more node, whose first process is another one's, as in a pod."""
        return subprocess.Popen([sys.executable, "-c", POD, self.cluster.address], stdout=subprocess.DEVNULL)

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
