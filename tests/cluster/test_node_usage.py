"""Samples of a node: the names of MLflow's own monitors, once per node, and steps that go on after a restart."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.allocation import Allocation
from cluster.layout import RankInfo
from cluster.node_usage import NodeUsage, metrics_of, samplers
from cluster.summary import RunRecord
from cluster.tracking.config import TrackingConfig
from cluster.tracking.spool import SPOOL_NAME
from cluster.tracking.tracker import Tracker


def fake_nvml() -> ModuleType:
    """Two GPUs, of which the second does not tell its power."""

    class NVMLError(Exception):
        pass

    def power(gpu: int) -> int:
        if gpu == 1:
            raise NVMLError("not supported")
        return 250_000

    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(used=20 * 10**9, total=80 * 10**9)
    module.nvmlDeviceGetUtilizationRates = lambda gpu: SimpleNamespace(gpu=97)
    module.nvmlDeviceGetPowerUsage = power
    module.nvmlDeviceGetEnforcedPowerLimit = lambda gpu: 500_000
    return module


def sample_of(usage: NodeUsage) -> dict[str, float]:
    deadline = time.monotonic() + 60.0
    while (sample := usage.take()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return sample


def test_a_sample_has_the_names_and_units_of_mlflows_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    expected: dict[str, float] = {}
    for monitor in (
        cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor(), gpu_monitor.GPUMonitor()
    ):  # fmt: skip
        monitor.collect_metrics()
        expected |= monitor.aggregate_metrics()
    usage = NodeUsage(0.05)
    assert usage.take() is None
    usage.start()
    sample = sample_of(usage)
    assert sample.keys() == expected.keys()
    for name in ("gpu_0_memory_usage_percentage", "gpu_0_power_usage_watts", "gpu_0_power_usage_percentage"):
        assert sample[name] == expected[name]
    assert sample["system_memory_usage_percentage"] == pytest.approx(expected["system_memory_usage_percentage"], abs=20)
    assert sample_of(usage).keys() == sample.keys(), "the next one follows"


def test_a_node_without_gpus_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    usage = NodeUsage(0.05)
    usage.start()
    assert not any(name.startswith("gpu") for name in sample_of(usage))


def test_one_rank_of_each_node_samples_it() -> None:
    ranks = [
        RankInfo(rank, 1, Allocation(host, address, 4), node=node)
        for rank, (host, address, node) in enumerate(
            [("a", "10.0.0.1", "n1"), ("a", "10.0.0.1", "n1"), ("b", "10.0.0.2", "n2"), ("b", "10.0.0.3", "n3")]
        )
    ]
    assert samplers(ranks) == {0, 2, 3}
    assert metrics_of({"x": 1.0}, ranks[0], ranks) == {"system/a/x": 1.0}
    assert metrics_of({"x": 1.0}, ranks[3], ranks) == {"system/b-10.0.0.3/x": 1.0}, "two nodes of one name"


def test_steps_go_on_where_an_earlier_attempt_ended(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    record = RunRecord()
    for _ in range(3):
        tracker.metrics(record.next_sample(), {"system/a/cpu_utilization_percentage": 1.0})
    tracker.metrics(7, {"accuracy": 1.0})
    tracker.finish("KILLED")
    tracker.close()
    later = RunRecord()
    later.continue_from(tmp_path / SPOOL_NAME)
    assert later.next_sample() == 3
