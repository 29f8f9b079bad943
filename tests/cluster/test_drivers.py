"""Drivers that are killed, and heads that die under them: what is left, what is said, within which time."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config import RunConfig
from tests.cluster.actors import ConfigMaker, assert_gone, limits, nothing_reserved
from tests.cluster.drivers import Driver, environment, longer

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(240)]

LONG = 4000
"""Epochs of a run that nobody waits for."""

HEARTBEAT_S = 5.0

Record = Callable[[str, object], None]


@pytest.fixture
def config(digits_config: ConfigMaker) -> RunConfig:
    return longer(digits_config(2, cluster=limits(heartbeat_s=HEARTBEAT_S)), LONG)


class Lasting:
    """A Ray cluster of one node with two CPUs that outlives its drivers."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.env = environment(RAY_ADDRESS=self.cluster.address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")

    def process(self, kind: str) -> psutil.Process:
        return psutil.Process(self.cluster.head_node.all_processes[kind][0].process.pid)


@pytest.fixture
def lasting() -> Iterator[Lasting]:
    found = Lasting()
    processes = [psutil.Process(found.process("raylet").pid), *found.process("raylet").children(recursive=True)]
    yield found
    found.cluster.shutdown()
    assert_gone([process.pid for process in processes])


def test_a_killed_driver_takes_its_embedded_ray_along(
    config: RunConfig, tmp_path: Path, record_property: Record
) -> None:
    with Driver(config, tmp_path / "run", tmp_path, environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")) as driver:
        driver.wait_for(lambda: driver.committed(20))
        everything = driver.descendants()
        names = {psutil.Process(pid).name() for pid in everything}
        assert {"gcs_server", "raylet"} <= names
        assert set(driver.rank_pids()[0]) <= set(everything)
        killed = time.monotonic()
        driver.kill()
        assert_gone(everything, limit_s=15.0)
    gone_s = time.monotonic() - killed
    record_property("gone_s", round(gone_s, 2))
    print(f"{len(everything)} processes gone {gone_s:.1f} s after the driver's SIGKILL")


def test_a_killed_driver_leaves_a_lasting_cluster_as_it_was(
    lasting: Lasting, config: RunConfig, tmp_path: Path, record_property: Record
) -> None:
    import ray

    with Driver(config, tmp_path / "run", tmp_path, lasting.env) as driver:
        driver.wait_for(lambda: driver.committed(20))
        ranks = driver.rank_pids()[0]
        killed = time.monotonic()
        driver.kill()
        assert_gone(ranks, limit_s=15.0)
    gone_s = time.monotonic() - killed
    ray.init(address=lasting.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        nothing_reserved(ray, 2.0)
    finally:
        ray.shutdown()
    record_property("gone_s", round(gone_s, 2))
    print(f"ranks gone {gone_s:.1f} s after the driver's SIGKILL")


@pytest.mark.parametrize("kind", ["gcs_server", "raylet"])
def test_a_head_that_dies_ends_the_run_with_a_word(
    lasting: Lasting, config: RunConfig, tmp_path: Path, record_property: Record, kind: str
) -> None:
    """Resumable: the checkpoints are there. The ranks are gone as well, on a machine that still runs."""
    with Driver(config, tmp_path / "run", tmp_path, lasting.env) as driver:
        driver.wait_for(lambda: driver.committed(20))
        ranks = driver.rank_pids()[0]
        process = lasting.process(kind)
        died = time.monotonic()
        process.kill()
        code = driver.finish(60.0)
        ended_s = time.monotonic() - died
        text = driver.text()
        print(text)
        assert code == 1, text
    summary = driver.summary()
    assert summary["status"] == "FAILED"
    assert "Traceback" not in text
    assert text.count("error: ") == 1
    record_property("ended_s", round(ended_s, 2))
    print(f"{kind}: ended {ended_s:.1f} s after its death: {summary['message']}")
    assert ended_s < HEARTBEAT_S + 25.0
    assert_gone(ranks, limit_s=90.0)


def test_an_address_where_nobody_is_ends_soon(config: RunConfig, tmp_path: Path) -> None:
    env = environment(RAY_ADDRESS="127.0.0.1:1", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    began = time.monotonic()
    with Driver(config, tmp_path / "run", tmp_path, env) as driver:
        assert driver.finish(60.0) == 1
    assert "error: RAY_ADDRESS: expected a running cluster at 127.0.0.1:1" in driver.text()
    assert driver.summary()["status"] == "FAILED"
    assert time.monotonic() - began < 40.0


def test_an_address_that_does_not_answer_ends_within_its_limit(config: RunConfig, tmp_path: Path) -> None:
    """Something listens and never says a word."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        short = config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout_s": 5.0})})
        env = environment(RAY_ADDRESS=address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        with Driver(short, tmp_path / "run", tmp_path, env) as driver:
            assert driver.finish(60.0) == 1
    assert f"error: RAY_ADDRESS: expected a running cluster at {address}" in driver.text()
    assert driver.summary()["status"] == "FAILED"


def test_a_stopped_driver_loses_its_ranks_and_gets_new_ones(
    lasting: Lasting, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """A driver that is away for longer than the lease of its ranks: they end; when it is back it replaces them."""
    group = limits(heartbeat_s=2.0, collective_timeout_s=4.0, start_timeout_s=8.0, max_restarts=10)
    config = longer(digits_config(2, cluster=group), 40)
    with Driver(config, tmp_path / "run", tmp_path, lasting.env) as driver:
        driver.wait_for(lambda: driver.committed(20))
        ranks = driver.rank_pids()[0]
        os.kill(driver.process.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        assert_gone(ranks, limit_s=40.0)
        print(f"ranks gone {time.monotonic() - stopped:.1f} s after the driver stopped")
        os.kill(driver.process.pid, signal.SIGCONT)
        assert driver.finish() == 0, driver.text()
    assert driver.summary()["restarts"] >= 1
