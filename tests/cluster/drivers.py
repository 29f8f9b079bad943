"""`python -m jobs.pretrain` as a process of its own, with its output and its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.config import RunConfig
from tests.cluster.actors import assert_gone
from tests.faults import FaultPlan

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 240.0

AGENTS_S = 90.0
"""Two agents of Ray's on every node wait for the head of a cluster that is gone for 60 s, and end then."""


def environment(**changes: str) -> dict[str, str]:
    """For a driver or a node that uses this checkout's packages and requires a token."""
    dropped = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"} | changes


def longer(config: RunConfig, epochs: int) -> RunConfig:
    """A run of `digits_config` whose second layer learns long enough to be disturbed, with 6 updates an epoch."""
    values = config.model_dump(mode="json")
    values["model"]["layers"][1]["train"]["epochs"] = epochs
    return RunConfig.model_validate_json(json.dumps(values))


class Driver:
    """The process.

    Parameters
    ----------
    folder: for its configuration and its output.
    before: words before the interpreter, such as those that enter a namespace.
    plan: the fault to inject, see `tests.faulty_job`.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        folder: Path,
        env: dict[str, str],
        before: Sequence[str] = (),
        plan: FaultPlan | None = None,
    ) -> None:
        self.run_dir, self.log = run_dir, folder / "driver.log"
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        program = ["jobs.pretrain"] if plan is None else ["tests.faulty_job", json.dumps(asdict(plan))]
        words = [*before, sys.executable, "-u", "-m", *program]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*words, "--config", str(file), "--run-dir", str(run_dir)],
                env=env,
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def wait_for(self, reached: Callable[[], bool], limit_s: float = RUN_S) -> float:
        """Seconds until something is so, while the process runs."""
        began = time.monotonic()
        while not reached():
            assert time.monotonic() - began < limit_s, self.text()
            assert self.process.poll() is None or reached(), self.text()
            time.sleep(0.02)
        return time.monotonic() - began

    def finish(self, limit_s: float = RUN_S) -> int:
        """Its exit status."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s:g} s:\n{self.text()}") from None

    def committed(self, step: int) -> bool:
        return (self.run_dir / f"checkpoints/step-{step:08d}/manifest.json").exists()

    def printed(self, word: str, times: int = 1) -> bool:
        return self.text().count(word) >= times

    def text(self) -> str:
        return self.log.read_text()

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def rank_pids(self) -> list[list[int]]:
        """Of every group so far."""
        lines = [line for line in self.text().splitlines() if line.startswith("ranks: ")]
        return [[int(part.split(")")[0]) for part in line.split("(pid ")[1:]] for line in lines]

    def descendants(self) -> list[int]:
        """Of this process, now."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


class LastingCluster:
    """A Ray cluster of one node with two CPUs that outlives its drivers."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.env = environment(RAY_ADDRESS=self.cluster.address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        raylet = psutil.Process(self._process("raylet").pid)
        self.pids = [raylet.pid, *(child.pid for child in raylet.children(recursive=True))]

    def kill(self, kind: str) -> None:
        """SIGKILL for `gcs_server` or `raylet`; waited for, since a zombie still counts as a parent."""
        self._process(kind).kill()
        self._process(kind).wait()

    def _process(self, kind: str) -> subprocess.Popen[bytes]:
        return self.cluster.head_node.all_processes[kind][0].process

    def shut_down(self) -> None:
        self.cluster.shutdown()
        assert_gone(self.pids, AGENTS_S)
