"""Shared by the tests of real actors: a watcher of the controller, short time limits, and checks of what is left."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cluster.config import RunConfig
from cluster.messages import GroupStarted, Note, Outbox, Progress
from cluster.training import Assignment, Training
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh

ConfigMaker = Callable[..., RunConfig]


def limits(**changes: Any) -> dict[str, Any]:
    """`cluster` of a configuration, with waits that fit a test."""
    waits = {"heartbeat_s": 20.0, "placement_timeout_s": 60.0, "start_timeout_s": 60.0}
    return {"poll_s": 0.1, "threads_per_rank": 1} | waits | changes


def train(exchange: Exchange, config: RunConfig, run_dir: Path) -> None:
    """A rank's program without Ray and without faults."""
    Training(Assignment(config, run_dir, exchange.rank), Mesh.of_owners(exchange), Outbox(), torch.device("cpu")).run()


def model(run_dir: Path) -> Path:
    return run_dir / "model" / "model.safetensors"


def assert_parity(run_dir: Path, other: Path) -> None:
    """Two runs in float64 of different shard counts: the tolerance of tests/cluster/test_parity.py."""
    weights, expected = load_file(model(run_dir)), load_file(model(other))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().amax()) if tensor.numel() else 0.0
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9 * scale, msg=name)


class Watcher:
    """Recorder and display of a run; keeps its notes with their times, and may act once, when a condition is met.

    Attributes
    ----------
    pids: of all ranks that there were, in order of their groups.
    times: of the notes.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []
        self.times: list[float] = []
        self.pids: list[int] = []
        self.latest: Progress | None = None
        self._actions: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def once(self, reached: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do something in the first round of the controller in which `reached` is true."""
        self._actions.append((reached, action))

    def metrics(self, step: int, values: Any, layer: int | None = None, time_s: float | None = None) -> None: ...

    def tags(self, values: dict[str, str]) -> None: ...

    def progress(self, latest: Progress) -> None:
        self.latest = latest
        for entry in [entry for entry in self._actions if entry[0]()]:
            self._actions.remove(entry)
            entry[1]()

    def note(self, note: Note) -> None:
        self.notes.append(str(note))
        self.times.append(time.monotonic())
        if isinstance(note, GroupStarted):
            self.pids += [rank.pid for rank in note.ranks]

    def committed(self, step: int) -> bool:
        return (self.run_dir / f"checkpoints/step-{step:08d}/manifest.json").exists()

    def at(self, word: str, after: float = 0.0) -> float:
        """When the first note with this word came, after a time."""
        return next(when for when, note in zip(self.times, self.notes, strict=True) if word in note and when > after)

    def restarts(self) -> list[str]:
        return [note for note in self.notes if "starting a new group" in note]


def pids_in(output: str) -> list[int]:
    """Of the ranks that a job has named."""
    return [int(pid) for found in re.findall(r", pids? ([\d, ]+)$", output, re.MULTILINE) for pid in found.split(", ")]


def assert_gone(pids: Iterable[int], limit_s: float = 20.0) -> None:
    """The processes have ended by themselves. One that did not is ended here, and the test fails."""
    deadline = time.monotonic() + limit_s
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not alive, f"processes {alive} outlived their group by {limit_s:g} s"


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def embedded_ray(cpus: int, **options: Any) -> Iterator[Any]:
    """The module `ray`, with a cluster of this process's own."""
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",  # nothing of it is reachable from outside
        **options,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def nothing_reserved(ray: Any, cpus: float, limit_s: float = 20.0) -> None:
    """No placement group, no reserved CPU. Ray gives them back with some delay."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU", 0.0) == cpus:
            return
        time.sleep(0.1)
    pytest.fail(f"left behind: {groups}, free: {ray.available_resources()}")
