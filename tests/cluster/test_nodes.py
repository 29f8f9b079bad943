"""Nodes that go, come back or do not: a Ray cluster of several nodes on this machine, a rank or a row on each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Controller, RunFailed
from cluster.group import WorkerGroup
from tests.cluster.actors import (
    ConfigMaker,
    Watcher,
    assert_gone,
    assert_parity,
    limits,
    model,
    nothing_reserved,
    train,
)
from tests.cluster.drivers import ROOT, environment
from tests.cluster.ray_nodes import Nodes
from tests.exchanges import results
from tests.faults import COMMITTED, MOMENTS, FaultPlan, faulty_worker

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(240)]

CHECKPOINT = 16
"""The newest before the moment "in mid-epoch"."""

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def two_nodes_and_nothing_left(nodes: Nodes) -> Iterator[None]:
    import ray

    nodes.fill(2)
    yield
    nothing_reserved(ray, len(nodes.cluster.worker_nodes))


@pytest.fixture(scope="module")
def undisturbed_double(ranks: Any, digits_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of one process without Ray, in float64, nothing going wrong."""
    run_dir = tmp_path_factory.mktemp("double")
    results(ranks(train, 1, digits_config(1, dtype="float64"), run_dir))
    return run_dir


class Scene:
    """A run of two ranks; the node of rank 1 goes at a moment at which rank 0 stays away, and nothing else happens."""

    def __init__(self, nodes: Nodes, config: Any, run_dir: Path, moment: str = "in mid-epoch") -> None:
        self.nodes, self.watcher = nodes, Watcher(run_dir)
        self.removed = 0.0
        self.origin = COMMITTED.get(MOMENTS[moment])
        self.signals = run_dir / "signals"
        self.signals.mkdir()
        worker = faulty_worker(FaultPlan.at(moment, "tell", rank=0, signals=str(self.signals)))
        self.controller = Controller(
            config, run_dir, lambda assignment: WorkerGroup(assignment, worker), self.watcher, self.watcher
        )
        self.watcher.once(self._has_come, self._remove)

    def _has_come(self) -> bool:
        committed = self.origin is None or self.watcher.committed(self.origin)
        return (self.signals / "here").exists() and committed

    def _remove(self) -> None:
        self.nodes.remove_that_of(self.watcher.pids[1])
        self.removed = time.monotonic()

    def figures(self, record_property: Record) -> None:
        """Seconds from the removal until the rank was named, and until ranks trained again."""
        named = self.watcher.at("starting a new group", self.removed) - self.removed
        again = self.watcher.at("ranks: ", self.removed) - self.removed
        record_property("named_s", round(named, 2))
        record_property("again_s", round(again, 2))
        print(f"named after {named:.1f} s, training again after {again:.1f} s")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_node_that_comes_back_is_waited_for(
    nodes: Nodes, digits_config: ConfigMaker, without_ray: bytes, tmp_path: Path, record_property: Record, moment: str
) -> None:
    scene = Scene(nodes, digits_config(2, cluster=limits()), tmp_path, moment)
    with ThreadPoolExecutor(1) as pool:  # nodes are added by the main thread only
        running = pool.submit(scene.controller.run)
        while not scene.removed:
            assert not running.done(), running.result()
            time.sleep(0.1)
        time.sleep(5.0)
        nodes.add()
        record = running.result()
    scene.figures(record_property)
    (told,) = scene.watcher.restarts()
    assert told.startswith(f"rank 1 (pid {scene.watcher.pids[1]} on ")
    origin = "the beginning" if scene.origin is None else f"step-{scene.origin:08d}"
    assert f"starting a new group from {origin}" in told
    assert record.restarts == 1
    assert record.steps == 22
    assert scene.controller.config.mesh.channel == 2
    assert model(tmp_path).read_bytes() == without_ray
    assert_gone(scene.watcher.pids)


def test_where_it_does_not_the_run_goes_on_with_the_shards_that_fit(
    nodes: Nodes, digits_config: ConfigMaker, undisturbed_double: Path, tmp_path: Path, record_property: Record
) -> None:
    config = digits_config(2, dtype="float64", cluster=limits(start_timeout_s=15.0, min_shards=1))
    scene = Scene(nodes, config, tmp_path)
    record = scene.controller.run()
    scene.figures(record_property)
    lost, shrunk = scene.watcher.restarts()
    assert "rank 1 (pid " in lost
    assert "no room for 2 ranks" in shrunk
    assert "1 rank more than there is room for" in shrunk
    assert f"starting a new group of 1 rank from step-{CHECKPOINT:08d}" in shrunk
    assert (record.restarts, record.steps, scene.controller.config.mesh.channel) == (2, 22, 1)
    assert_parity(tmp_path, undisturbed_double)
    assert_gone(scene.watcher.pids)


def test_a_run_that_may_not_shrink_ends_and_says_what_is_missing(
    nodes: Nodes, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    scene = Scene(nodes, digits_config(2, cluster=limits(placement_timeout_s=10.0)), tmp_path)
    with pytest.raises(RunFailed) as caught:
        scene.controller.run()
    ended_s = time.monotonic() - scene.removed
    message = str(caught.value)
    assert message.startswith("no room for 2 ranks of 1 CPU within 10 s; free now: 1 CPU; nodes: ")
    assert "127.0.0.1 with 0 CPU" in message
    assert "127.0.0.1 with 1 CPU" in message
    assert message.endswith("1 rank more than there is room for; cluster.placement_timeout_s=10")
    assert scene.watcher.committed(CHECKPOINT)  # from where it can go on
    assert scene.controller.record.restarts == 1
    assert 10.0 <= ended_s < 60.0
    assert_gone(scene.watcher.pids)


def test_nodes_that_come_late_cost_no_restart(
    nodes: Nodes, digits_config: ConfigMaker, without_ray: bytes, tmp_path: Path
) -> None:
    """The run begins on a cluster without a node for any rank; its one request is there until all have come."""
    import ray

    for node in list(nodes.cluster.worker_nodes):
        nodes.cluster.remove_node(node, allow_graceful=False)
    watcher = Watcher(tmp_path)
    controller = Controller(digits_config(2, cluster=limits()), tmp_path, WorkerGroup, watcher, watcher)
    before = set(ray.util.placement_group_table())
    seen: set[str] = set()
    with ThreadPoolExecutor(1) as pool:  # nodes are added by the main thread only
        running = pool.submit(controller.run)
        for come in range(2):
            while not any(note.startswith("waiting ") and note.count(" with 1 CPU") == come for note in watcher.notes):
                assert not running.done(), running.result()
                seen |= set(ray.util.placement_group_table()) - before
                time.sleep(0.1)
            nodes.add()
        record = running.result()
    seen |= set(ray.util.placement_group_table()) - before
    assert len(seen) == 1
    assert record.restarts == 0
    assert watcher.notes[0].startswith("waiting for room for 2 ranks of 1 CPU, at most 60 s (cluster.placement_timeout")
    assert any(note.startswith("room for 2 ranks of 1 CPU after ") for note in watcher.notes)
    assert model(tmp_path).read_bytes() == without_ray


HELD = """
import os, sys, time
from pathlib import Path

from jobs.evaluate import main
from jobs.evaluation import ray_units

marks = Path(sys.argv[1])


def held(text, unit, *others):
    from jobs.evaluation.ray_units import _task

    (marks / f"{os.getppid()} {os.getpid()} {unit}").touch()
    while not (marks / "go").exists():
        time.sleep(0.05)
    return _task(text, unit, *others)


ray_units._task = held
sys.exit(main(sys.argv[2:]))
"""
"""An evaluation whose units say on which raylet's node they are, and wait for a word to begin."""


def test_what_a_lost_node_was_to_measure_is_measured_by_another(nodes: Nodes, tmp_path: Path) -> None:
    """Rows of `jobs.evaluate` side by side on two nodes; equal to one after the other in every figure but seconds."""
    small = ("data.train_images=400", "data.test_images=150", "held_out=60", "seeds=[0]", "budgets=[5]")
    few = ("tuning_images=150", "corrupted_images=0", "outlier_images=0", "tracking.enabled=false")
    arguments = ["--config", str(ROOT / "jobs/configs/evaluate_digits.yaml"), "--threads", "1"]
    arguments += [word for assignment in (*small, *few) for word in ("--set", assignment)]
    arguments += ["--rows", "kmeans", "pixels"]
    whole, disturbed, marks, held = (tmp_path / name for name in ("whole", "disturbed", "marks", "held.py"))
    marks.mkdir()
    held.write_text(HELD)
    alone = [sys.executable, "-m", "jobs.evaluate", *arguments, "--run-dir", str(whole)]
    subprocess.run(alone, check=True, env=environment(), cwd=ROOT, timeout=120)
    with subprocess.Popen(
        [sys.executable, str(held), str(marks), *arguments, "--workers", "2", "--run-dir", str(disturbed)],
        env=environment(RAY_ADDRESS=nodes.cluster.address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while len(begun := sorted(path.name for path in marks.iterdir())) < 2:
                assert process.poll() is None
                assert time.monotonic() < deadline, begun
                time.sleep(0.1)
            lost, pid, unit = begun[0].split(maxsplit=2)
            nodes.remove(int(lost))
            assert_gone([int(pid)])
            (marks / "go").touch()
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert len([path for path in marks.iterdir() if path.name.endswith(f" {unit}")]) == 2
    timed = {"fit_seconds", "images_per_second"}
    for name in ("kmeans-0.json", "pixels-0.json"):
        expected, found = (json.loads((folder / "results" / name).read_text()) for folder in (whole, disturbed))
        assert {key: value for key, value in found.items() if key not in timed} == {
            key: value for key, value in expected.items() if key not in timed
        }
