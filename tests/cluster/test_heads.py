"""Heads of Ray clusters that die under a driver or were never there: what it says, within which time."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import RunConfig
from tests.cluster.actors import ConfigMaker, assert_gone, limits
from tests.cluster.drivers import Driver, LastingCluster, environment, longer

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


@pytest.mark.parametrize(
    ("kind", "says", "limit_s"),
    [
        ("gcs_server", r"error: the head of the Ray cluster at 127\.0\.0\.1:\d+ has not answered for 5 s\n", 30.0),
        (
            "raylet",
            r"error: the Ray (node that this job's driver runs on is gone|cluster did not .* does not exist)",
            60.0,
        ),
    ],
)
def test_a_head_that_dies_ends_the_run_with_one_line(
    lasting: LastingCluster,
    config: RunConfig,
    tmp_path: Path,
    record_property: Record,
    kind: str,
    says: str,
    limit_s: float,
) -> None:
    """Resumable: the checkpoints are there. The ranks are gone as well, on a machine that still runs."""
    with Driver(config, tmp_path / "run", tmp_path, lasting.env) as driver:
        driver.wait_for(lambda: driver.committed(20))
        ranks = driver.rank_pids()[0]
        died = time.monotonic()
        lasting.kill(kind)
        code = driver.finish(limit_s + 30.0)
        ended_s = time.monotonic() - died
        text = driver.text()
        assert code == 1, text
    summary = driver.summary()
    assert summary["status"] == "FAILED"
    assert "Traceback" not in text
    assert re.search(says, text)
    record_property("ended_s", round(ended_s, 2))
    print(f"{kind}: ended {ended_s:.1f} s after its death: {summary['message']}")
    assert ended_s < limit_s
    assert_gone(ranks, limit_s=90.0)


def test_an_address_where_nobody_is_ends_soon(config: RunConfig, tmp_path: Path) -> None:
    env = environment(RAY_ADDRESS="127.0.0.1:1", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    began = time.monotonic()
    with Driver(config, tmp_path / "run", tmp_path, env) as driver:
        assert driver.finish(60.0) == 1
    assert "error: RAY_ADDRESS: expected a running cluster at 127.0.0.1:1" in driver.text()
    assert not driver.run_dir.exists()
    assert time.monotonic() - began < 40.0


def test_an_address_that_does_not_answer_ends_within_its_limit(config: RunConfig, tmp_path: Path) -> None:
    """Something listens and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        short = config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout_s": 5.0})})
        env = environment(RAY_ADDRESS=address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        with Driver(short, tmp_path / "run", tmp_path, env) as driver:
            assert driver.finish(60.0) == 1
    assert f"error: RAY_ADDRESS: expected a running cluster at {address}" in driver.text()
    assert not driver.run_dir.exists()
