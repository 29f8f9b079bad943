"""Nodes that are taken away with notice and come back: a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import RunConfig
from cluster.controller import Controller
from cluster.group import WorkerGroup
from cluster.summary import RunRecord
from tests.cluster.actors import ConfigMaker, Watcher, assert_gone, limits, model, nothing_reserved, train
from tests.cluster.drivers import Driver, LastingCluster, longer
from tests.cluster.ray_nodes import Nodes, drain
from tests.exchanges import results
from tests.faults import FaultPlan, faulty_worker

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(240)]

EPOCHS = 8
"""Of the second layer, 6 updates each; the first has 10 updates."""

STEPS = 10 + 6 * EPOCHS


@pytest.fixture(autouse=True)
def two_nodes_and_nothing_left(nodes: Nodes) -> Iterator[None]:
    import ray

    nodes.fill(2)
    yield
    nodes.forget_the_ended()
    nothing_reserved(ray, len(nodes.cluster.worker_nodes))


@pytest.fixture(scope="module")
def config(digits_config: ConfigMaker) -> Callable[..., RunConfig]:
    """Sums are exact, so that the weights have the same bits at any number of shards."""

    def make(**waits: Any) -> RunConfig:
        values = longer(digits_config(2, cluster=limits(**waits)), EPOCHS).model_dump(mode="json")
        values["reduce"] = "exact"
        for layer in values["model"]["layers"]:
            layer["dynamics"]["exchange"] = "gather_state"
        return RunConfig.model_validate(values)

    return make


@pytest.fixture(scope="module")
def undisturbed(ranks: Any, config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model of two plain processes, nothing going wrong."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    results(ranks(train, 2, config(), run_dir))
    return model(run_dir).read_bytes()


def until(reached: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Scene:
    """A run of two ranks. Rank 0 stays away at given moments: (generation, update of the second layer) each."""

    def __init__(self, config: RunConfig, run_dir: Path, *moments: tuple[int, int]) -> None:
        self.watcher, self.run_dir = Watcher(run_dir), run_dir
        plans = []
        for number, (generation, update) in enumerate(moments):
            signals = run_dir / f"signals-{number}"
            signals.mkdir()
            plans.append(FaultPlan(0, 1, update, "tell", generation, signals=str(signals)))
        worker = faulty_worker(*plans)
        self.controller = Controller(
            config, run_dir, lambda assignment: WorkerGroup(assignment, worker), self.watcher, self.watcher
        )

    def here(self, number: int) -> bool:
        """Whether rank 0 has come to a moment."""
        return (self.run_dir / f"signals-{number}" / "here").exists()

    def goes_on_after(self, number: int, word: str) -> None:
        """Rank 0 goes on once this has been told, and all ranks have heard of it."""
        told = lambda: any(word in note for note in self.watcher.notes)  # noqa: E731
        self.watcher.once(told, (self.run_dir / f"signals-{number}" / "go").touch)

    def run(self, *acts: tuple[Callable[[], bool], Callable[[], object]]) -> RunRecord:
        """Run it; each act waits for its condition in turn, in the main thread, where nodes can be added."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.controller.run)
            for reached, act in acts:
                while not reached():
                    assert not running.done(), (running.result(), self.watcher.notes)
                    time.sleep(0.05)
                act()
            record = running.result()
        assert record.steps == STEPS
        return record


def test_a_drained_node_costs_no_update(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path
) -> None:
    """Ray 63968: a notice with a deadline leads to a checkpoint, to a group without that node, and is no failure."""
    import ray

    nodes.fill(3)
    scene = Scene(config(max_restarts=0), tmp_path, (0, 16))
    drained: list[str] = []

    def drain() -> None:
        drained.append(nodes.drain(scene.watcher.pids[1], 30))

    scene.goes_on_after(0, "is drained by Ray")
    record = scene.run((lambda: scene.here(0), drain))
    asked, told = [note for note in scene.watcher.notes if "is drained by Ray" in note]
    what = r"node \S+ \(127\.0\.0\.1\) with rank 1 is drained by Ray and ends in [123]?\d s"
    assert re.fullmatch(what + ": waiting for a last checkpoint", asked)
    assert "s later; starting a new group from step-00000030" in told
    assert "to repeat" not in told
    assert (record.preemptions, record.restarts, record.growths, record.steps_again) == (1, 0, 0, 0)
    assert model(tmp_path).read_bytes() == undisturbed
    (node,) = [node for node in ray.nodes() if node["NodeID"] == drained[0]]
    assert (node["Alive"], node["DeathReasonMessage"]) == (False, "reclaimed")  # Ray ends it once its ranks are gone
    assert_gone(scene.watcher.pids)


def test_a_group_that_may_not_shrink_waits_for_the_node(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path
) -> None:
    scene = Scene(config(max_restarts=0), tmp_path, (0, 16))
    scene.goes_on_after(0, "is drained by Ray")
    record = scene.run(
        (lambda: scene.here(0), lambda: nodes.drain(scene.watcher.pids[1], 30)),
        (lambda: bool(scene.watcher.restarts()), nodes.add),
    )
    assert (record.preemptions, record.restarts, record.growths, record.steps_again) == (1, 0, 0, 0)
    assert model(tmp_path).read_bytes() == undisturbed


def test_a_group_that_shrank_grows_back(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path
) -> None:
    """Two groups that find no place, or do, and the bits of a run without either."""
    waits = {"start_timeout_s": 30.0, "min_shards": 1, "grow_after_s": 1.0}
    scene = Scene(config(**waits), tmp_path, (0, 16), (2, 36))
    scene.goes_on_after(0, "is drained by Ray")
    scene.goes_on_after(1, "there is room for 2 ranks again")
    record = scene.run(
        (lambda: scene.here(0), lambda: nodes.drain(scene.watcher.pids[1], 30)),
        (lambda: scene.here(1), nodes.add),
    )
    drained, shrunk, grown = scene.watcher.restarts()
    assert "is drained by Ray" in drained
    assert "starting a new group of 1 rank from step-00000030" in shrunk
    assert "starting a new group of 2 ranks from step-00000050" in grown
    assert "to repeat" not in grown
    assert (record.preemptions, record.restarts, record.growths, record.steps_again) == (1, 1, 1, 0)
    assert scene.controller.config.mesh.channel == 2
    assert model(tmp_path).read_bytes() == undisturbed
    assert_gone(scene.watcher.pids)


def test_a_process_that_gets_sigterm_is_replaced_after_a_checkpoint(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path
) -> None:
    scene = Scene(config(max_restarts=0), tmp_path, (0, 16))
    scene.goes_on_after(0, "has got SIGTERM")
    record = scene.run((lambda: scene.here(0), lambda: os.kill(scene.watcher.pids[1], signal.SIGTERM)))
    (told,) = scene.watcher.restarts()
    assert told.startswith(f"rank 1 (pid {scene.watcher.pids[1]} on ")
    assert "has got SIGTERM, stopped" in told
    assert "starting a new group from step-00000030" in told
    assert (record.preemptions, record.restarts, record.steps_again) == (1, 0, 0)
    assert model(tmp_path).read_bytes() == undisturbed
    assert_gone(scene.watcher.pids)


def test_a_node_that_is_told_to_end_is_no_failure(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path
) -> None:
    """`ray stop` and a job step that is cancelled end Ray's own process at once: the newest checkpoint counts."""
    scene = Scene(config(max_restarts=0), tmp_path, (0, 16))

    def end() -> None:
        raylet = psutil.Process(psutil.Process(scene.watcher.pids[1]).ppid())
        raylet.terminate()
        raylet.wait(30)

    record = scene.run(
        (lambda: scene.here(0) and scene.watcher.committed(24), end),
        (lambda: bool(scene.watcher.restarts()), nodes.add),
    )
    (told,) = scene.watcher.restarts()
    assert "its node was ended: received SIGTERM; starting a new group from step-00000024" in told
    assert (record.preemptions, record.restarts) == (1, 0)
    assert model(tmp_path).read_bytes() == undisturbed


def test_a_pod_that_is_deleted_drains_its_node(
    nodes: Nodes, config: Callable[..., RunConfig], undisturbed: bytes, tmp_path: Path, record_property: Any
) -> None:
    """`ray start --block` that gets SIGTERM waits until its node is empty, 30 s at most: the ranks leave before."""
    import ray

    nodes.remove(nodes.raylet(next(iter(nodes.cluster.worker_nodes))))
    until(lambda: ray.cluster_resources()["CPU"] == 1.0, 30.0)
    pod = nodes.add_pod()
    try:
        until(lambda: ray.cluster_resources()["CPU"] == 2.0, 60.0)
        scene = Scene(config(max_restarts=0), tmp_path, (0, 16))
        scene.goes_on_after(0, "is drained by Ray")
        told_at: list[float] = []

        def delete() -> None:
            pod.terminate()
            told_at.append(time.monotonic())

        def replace() -> None:
            pod.wait(30.0)
            told_at.append(time.monotonic())
            nodes.add()

        record = scene.run((lambda: scene.here(0), delete), (lambda: bool(scene.watcher.restarts()), replace))
    finally:
        pod.terminate()
        pod.wait(60.0)
    assert (record.preemptions, record.restarts, record.steps_again) == (1, 0, 0)
    assert model(tmp_path).read_bytes() == undisturbed
    gone_s = told_at[1] - told_at[0]
    assert gone_s < 30.0
    record_property("gone_s", round(gone_s, 2))


def test_a_driver_whose_node_is_drained_ends_in_order(digits_config: ConfigMaker, tmp_path: Path) -> None:
    lasting = LastingCluster()
    config = longer(digits_config(2, cluster=limits()), 4000)
    try:
        with Driver(config, tmp_path / "run", tmp_path, lasting.env) as driver:
            driver.wait_for(lambda: driver.committed(20))
            drain(lasting.cluster.address, lasting.cluster.head_node.node_id, 60)
            assert driver.finish() == 143, driver.text()
    finally:
        lasting.shut_down()
    summary = driver.summary()
    assert summary["status"] == "KILLED"
    assert summary["message"].startswith("node ")
    assert " with ranks 0, 1 and the driver of this job is drained by Ray and ends in " in summary["message"]
    step = int(summary["message"].removesuffix(".").split("the newest checkpoint is of step ")[1])
    assert driver.committed(step)
    assert step % config.log_every == 0  # written for the occasion: checkpoints are due every four updates
