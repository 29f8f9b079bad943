"""How much of a node is in use: CPU, memory, disk, network and GPUs, under the names that MLflow's page shows.

One rank of each node samples it, in a thread of its own: a GPU that hangs must not keep the rank from answering. The
samples go with the rank's answers to the controller, so nothing waits for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil

from cluster.layout import RankInfo

PREFIX = "system/"
"""MLflow shows metrics `system/NODE/…` on a page of their own."""


class NodeUsage:
    """Samples this node every `every_s` seconds, from `start` to the end of the process."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._lock = threading.Lock()
        self._newest: dict[str, float] | None = None

    def start(self) -> None:
        """Begin to sample."""
        threading.Thread(target=self._run, name="node-usage", daemon=True).start()

    def take(self) -> dict[str, float] | None:
        """The newest sample, once; None if there is none since the last call."""
        with self._lock:
            sample, self._newest = self._newest, None
        return sample

    def _run(self) -> None:
        pause = threading.Event()
        psutil.cpu_percent()  # of the time since the call before, so the first has no meaning
        first, gpus = psutil.net_io_counters(), _Gpus()
        while not pause.wait(self.every_s):
            with suppress(OSError, psutil.Error):  # the next sample may succeed
                sample = _sample(first) | gpus.sample()
                with self._lock:
                    self._newest = {name: round(value, 1) for name, value in sample.items()}


def _sample(first: Any) -> dict[str, float]:
    """Names and units are those of MLflow's own monitors. first: counters of the network when sampling began."""
    memory, disk, moved = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if moved is not None and first is not None:  # a host may show no interface
        values["network_receive_megabytes"] = (moved.bytes_recv - first.bytes_recv) / 1e6
        values["network_transmit_megabytes"] = (moved.bytes_sent - first.bytes_sent) / 1e6
    return values


class _Gpus:
    """The node's NVIDIA GPUs; none without the package nvidia-ml-py or a driver."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            self._nvml = import_module("pynvml")
            self._nvml.nvmlInit()
            number = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(number)]
        except Exception:  # whatever the package or the driver lacks
            pass

    def sample(self) -> dict[str, float]:
        """Without what a GPU does not tell."""
        nvml = self._nvml
        values: dict[str, float] = {}
        for index, gpu in enumerate(self._handles):
            with suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            with suppress(nvml.NVMLError):
                values[f"gpu_{index}_utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            with suppress(nvml.NVMLError):
                milliwatts, most = nvml.nvmlDeviceGetPowerUsage(gpu), nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
                values[f"gpu_{index}_power_usage_watts"] = milliwatts / 1000
                values[f"gpu_{index}_power_usage_percentage"] = 100 * milliwatts / most
        return values


def samplers(ranks: Sequence[RankInfo]) -> set[int]:
    """The ranks that sample their nodes: the first of each."""
    return {min(rank.rank for rank in ranks if rank.node == node) for node in {rank.node for rank in ranks}}


def metrics_of(sample: dict[str, float], rank: RankInfo, ranks: Sequence[RankInfo]) -> dict[str, float]:
    """A sample of a rank's node under the names of MLflow's page, which hold the node's name, or if several nodes have
    it, its address too.

    >>> from cluster.allocation import Allocation
    >>> here = RankInfo(0, 1, Allocation("node-a", "10.0.0.1", 4), node="n1")
    >>> metrics_of({"cpu_utilization_percentage": 12.0}, here, [here])
    {'system/node-a/cpu_utilization_percentage': 12.0}
    """
    here = rank.allocation
    shared = any(other.allocation.host == here.host and other.node != rank.node for other in ranks)
    name = f"{here.host}-{here.address}" if shared else here.host
    return {f"{PREFIX}{name}/{key}": value for key, value in sample.items()}


def is_usage(name: str) -> bool:
    """Whether a metric is of a node."""
    return name.startswith(PREFIX)
