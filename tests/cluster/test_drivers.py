"""Drivers that are killed or stopped: what is left of their ranks, and for how long."""

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
from tests.cluster.drivers import AGENTS_S, Driver, LastingCluster, environment, longer

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(240)]

LONG = 4000
"""Epochs of a run that nobody waits for."""

HEARTBEAT_S = 5.0

Record = Callable[[str, object], None]


@pytest.fixture
def config(digits_config: ConfigMaker) -> RunConfig:
    return longer(digits_config(2, cluster=limits(heartbeat_s=HEARTBEAT_S)), LONG)


@pytest.fixture
def lasting() -> Iterator[LastingCluster]:
    found = LastingCluster()
    yield found
    found.shut_down()


def test_a_killed_driver_takes_its_embedded_ray_along(
    config: RunConfig, tmp_path: Path, record_property: Record
) -> None:
    with Driver(config, tmp_path / "run", tmp_path, environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")) as driver:
        driver.wait_for(lambda: driver.committed(20))
        everything = driver.descendants()
        names = {psutil.Process(pid).name() for pid in everything}
        assert {"gcs_server", "raylet"} <= names
        assert set(driver.rank_pids()[0]) <= set(everything)
        agents = [pid for pid in everything if "agent" in " ".join(psutil.Process(pid).cmdline()).lower()]
        killed = time.monotonic()
        driver.kill()
        assert_gone([pid for pid in everything if pid not in agents], limit_s=15.0)
        gone_s = time.monotonic() - killed
        assert_gone(agents, limit_s=AGENTS_S)
    agents_s = time.monotonic() - killed
    record_property("gone_s", round(gone_s, 2))
    record_property("agents_s", round(agents_s, 2))
    print(f"{len(everything)} processes gone {gone_s:.1f} s after the driver's SIGKILL, Ray's agents {agents_s:.1f} s")


def test_a_killed_driver_leaves_a_lasting_cluster_as_it_was(
    lasting: LastingCluster, config: RunConfig, tmp_path: Path, record_property: Record
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


def test_a_stopped_driver_loses_its_ranks_and_gets_new_ones(
    lasting: LastingCluster, digits_config: ConfigMaker, tmp_path: Path
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
