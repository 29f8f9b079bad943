"""The order of the checks, and their limits: what the driver can see, what nodes say of themselves, and their links.

Checks run side by side in threads; one that hangs is left behind with a line that names it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.allocation import Allocation, allocation
from cluster.config import RunConfig
from cluster.controller import RunFailed
from cluster.redaction import one_line
from cluster.storage import AnyPath
from cluster.text import count
from cluster.tracking.config import TrackingConfig
from jobs.diagnosis import judge, surroundings
from jobs.diagnosis.findings import Finding, merged, ok
from jobs.diagnosis.node import clock, data_digest, data_of, gpus, room_of_node, versions
from jobs.diagnosis.nodes import Answers, Nodes, RayNodes, late, living
from jobs.diagnosis.report import Report
from jobs.diagnosis.surroundings import working_folder
from jobs.plan import image_bytes, rank_bytes
from jobs.plan_memory import plan_features
from jobs.preflight import check
from jobs.ray_session import embeds_ray, shut_down_ray, start_ray
from jobs.run_directory import place_of
from simmatch.config import ConfigError
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset

CHECKS = (
    "configuration", "mlflow", "cluster", "token", "nodes", "clocks", "versions", "gpus", "cores", "memory",
    "interface", "data", "disk", surroundings.RUN_DIR, "links",
)  # fmt: skip

TOTAL_S = 115.0
"""Longest time that all checks take together."""

JOIN_S, START_S, CHECK_S, LINKS_S = 15.0, 40.0, 40.0, 40.0
"""Longest waits: for the cluster after its first answer, for processes on nodes, for a check, for all links."""

ANSWER_S = 10.0
"""Longest wait for what takes no time."""

MARGIN_S = 2.0
"""A check that waits for nodes names those that are late itself."""

POLL_S = 0.1

CLUSTER_FIX = "start it (ray start --head), correct RAY_ADDRESS, or open its port to this machine"
TOKEN_FIX = "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH: the token that the cluster's nodes were started with"
OPEN_FIX = "start every node with RAY_AUTH_MODE=token and one token, see infra/README.md"
CONFIG_FIX = "correct the configuration or the data; python -m jobs.pretrain --dry-run shows the plan"


@dataclass
class Running:
    """A check under way."""

    limit_s: float
    began: float = field(default_factory=time.monotonic)
    found: list[Finding] | None = None


class Examination:
    """All checks, once.

    Parameters
    ----------
    config: of the run that is to work; None: what no configuration is needed for.
    run_dir: as given to `jobs.pretrain`.
    """

    def __init__(self, config: RunConfig | None, run_dir: str | None, report: Report) -> None:
        self.config, self._run_dir, self.report = config, run_dir, report
        self._dataset: Future[Dataset | None] = Future()
        self._allocations: Future[dict[str, Allocation]] = Future()
        self._running: dict[str, Running] = {}
        self._ends = time.monotonic() + TOTAL_S
        self._known_by = time.monotonic() + CHECK_S
        self._alone = embeds_ray()

    def run(self) -> None:
        """Check everything; the report has all findings afterwards."""
        self._begin("configuration", CHECK_S, self._configuration)
        self._begin("mlflow", CHECK_S, self._tracking)
        self.report.waiting(["cluster"])
        try:
            if not self._join():
                self._without_nodes()
                return
            nodes = RayNodes(living())
            try:
                self.report.waiting(["nodes"])
                self._on_nodes(nodes, nodes.start(self._left(START_S)))
            finally:
                nodes.end()
        finally:
            shut_down_ray()

    def _left(self, limit_s: float) -> float:
        return max(1.0, min(limit_s, self._ends - time.monotonic()))

    # -- running -------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, limit_s: float, call: Callable[[], list[Finding]]) -> None:
        running = self._running[name] = Running(self._left(limit_s))

        def run() -> None:
            try:
                running.found = call()
            except ConfigError as error:
                running.found = [Finding(name, "failure", one_line(error), CONFIG_FIX)]
            except Exception as error:  # of whatever is broken
                running.found = [Finding(name, "failure", f"{type(error).__name__}: {one_line(error)}")]

        threading.Thread(target=run, name=name, daemon=True).start()

    def _await(self) -> None:
        """Wait for all that has begun, and report it."""
        while self._running:
            for name, running in list(self._running.items()):
                found = running.found
                if found is None and time.monotonic() - running.began > running.limit_s:
                    found = [late(name, running.limit_s)]
                if found is not None:
                    self.report.add(name, found)
                    del self._running[name]
            if self._running:
                self.report.waiting(list(self._running))
                time.sleep(POLL_S)

    # -- the driver's own ----------------------------------------------------------------------------------------------

    def _configuration(self) -> list[Finding]:
        """Everything that can be wrong before a process starts, as a job checks it."""
        config, name = self.config, "configuration"
        fits = None  # what does not fit is told here alone
        try:
            if config is None:
                return [ok(name, "none given: data, memory and threads are not checked; see --config")]
            config.check_mesh()
            dataset = data_of(config.data)
            if dataset is None:
                text = f"{config.data.title}: own images of more than a gigabyte, which every node would decode first"
                return [Finding(name, "warning", text, "python -m jobs.prepare, once, to a place that all nodes read")]
            fits = check(config, lambda _: dataset)
        except (ConfigError, DataError, OSError) as error:
            return [Finding(name, "failure", one_line(error), CONFIG_FIX)]
        finally:
            self._dataset.set_result(fits)
        ranks = f"{count(config.mesh.world_size, 'rank')} on {config.device}"
        images = count(len(dataset.train_images), "training image")
        return [ok(name, f"{config.name}: {config.mesh}, {ranks}; {dataset.name}, {images}", name=config.name)]

    def _tracking(self) -> list[Finding]:
        config = self.config.tracking if self.config else TrackingConfig()
        place = self._known_place()
        beside = Path("runs", "any") if self.config is None or place is None else working_folder(self.config, place)
        return [surroundings.look_at_tracking(config, beside, ANSWER_S)]

    def _place(self) -> AnyPath:
        return place_of(self.config.name if self.config else "", self._run_dir)

    def _data_set(self) -> Dataset | None:
        """None where it cannot be read, or not in time: the line of the configuration says why."""
        try:
            return self._dataset.result(max(0.0, self._known_by - time.monotonic()))
        except TimeoutError:
            return None

    def _known_place(self) -> AnyPath | None:
        """None where there can be none: the check of the run directory says why."""
        try:
            return self._place()
        except (ConfigError, OSError):
            return None

    def _join(self) -> bool:
        """Join the cluster, or make one; reports what that says."""
        cluster = self.config.cluster if self.config else None
        cpus = self.config.mesh.world_size * self.config.cluster.cpus_per_rank if self.config and cluster else 1
        try:
            where = start_ray(cpus, JOIN_S)
        except (ConfigError, RunFailed) as error:
            text = one_line(error)
            if text.startswith(("RAY_AUTH", "~/.ray")):
                self.report.skip("cluster")
                self.report.add("token", [Finding("token", "failure", text, TOKEN_FIX)])
            else:
                self.report.add("cluster", [Finding("cluster", "failure", text, CLUSTER_FIX)])
                self.report.skip("token")
            return False
        if self._alone:
            where = "RAY_ADDRESS names none: this machine alone, with a Ray of its own"
        self.report.add("cluster", [ok("cluster", where)])
        mode = os.environ.get("RAY_AUTH_MODE", "")
        text = "made for this check" if self._alone else "asked for, and accepted"
        if mode == "disabled":
            text = "the cluster asks for none: whoever reaches its ports can run code there"
            self.report.add("token", [Finding("token", "warning", text, OPEN_FIX)])
        else:
            self.report.add("token", [ok("token", text if mode == "token" else "not known: the cluster uses TLS")])
        return True

    def _without_nodes(self) -> None:
        self._begin(surroundings.RUN_DIR, CHECK_S, lambda: self._run_directory(None))
        self._begin("disk", CHECK_S, self._own_disk)
        self.report.skip(*(name for name in CHECKS[CHECKS.index("nodes") :] if name not in self._running))
        self._await()

    # -- on nodes ------------------------------------------------------------------------------------------------------

    def _on_nodes(self, nodes: Nodes, missing: Sequence[Finding]) -> None:
        from jobs.diagnosis.link_check import LinkCheck  # imports ray, whose environment is set by now

        self.report.nodes = len(nodes.nodes) + len(missing)
        self.report.add("nodes", [*missing, *judge.judge_nodes(nodes.nodes, None if missing else self.config)])
        links = LinkCheck(nodes.nodes, self.config, LINKS_S)
        try:
            links.start()
            for name, call in self._node_checks(nodes).items():
                limit_s = CHECK_S + MARGIN_S
                self._begin(name, limit_s, lambda call=call: merged(call()))  # type: ignore[misc]
            self._await()
            self._begin("links", LINKS_S + MARGIN_S, links.run)
            self._await()
        finally:
            links.end()

    def _node_checks(self, nodes: Nodes) -> dict[str, Callable[[], list[Finding]]]:
        return {
            "clocks": lambda: self._clocks(nodes),
            "versions": lambda: _asked(nodes.ask("versions", CHECK_S, versions), judge.judge_versions),
            "gpus": lambda: _asked(
                nodes.ask("gpus", CHECK_S, gpus), lambda found: judge.judge_gpus(found, nodes.nodes, self.config)
            ),
            "cores": lambda: self._cores(nodes),
            "memory": lambda: self._memory(nodes),
            "interface": lambda: judge.judge_interfaces(self._allocations.result()),
            "data": lambda: self._data(nodes),
            "disk": lambda: [*self._own_disk(), *self._disks(nodes)],
            surroundings.RUN_DIR: lambda: self._run_directory(nodes),
        }

    def _clocks(self, nodes: Nodes) -> list[Finding]:
        nodes.ask("clocks", ANSWER_S, clock)  # the first answer may be late, as the process is new
        began = time.time()
        answers = nodes.ask("clocks", ANSWER_S, clock)
        half_s = (time.time() - began) / 2
        offsets = {name: (at - began - half_s, half_s) for name, at in answers.by_node.items()}
        return [*answers.faults, *judge.judge_clocks(offsets)]

    def _cores(self, nodes: Nodes) -> list[Finding]:
        """Asks for the allocations, which memory and interface wait for: a silent node is one fault."""
        interface, answers = self.config.cluster.interface if self.config else None, Answers()
        try:
            answers = nodes.ask("cores", CHECK_S, allocation, lambda node: (interface, node.address))
        finally:
            self._allocations.set_result(answers.by_node)
        return [*answers.faults, *judge.judge_cores(answers.by_node, nodes.nodes, self.config)]

    def _memory(self, nodes: Nodes) -> list[Finding]:
        config, dataset = self.config, self._data_set()
        needed = None if dataset is None or config is None else rank_bytes(config, dataset)
        return judge.judge_memory(self._allocations.result(), nodes.nodes, config, needed)

    def _data(self, nodes: Nodes) -> list[Finding]:
        config = self.config
        if config is None:
            return []
        dataset = self._data_set()
        if dataset is None:
            return []
        if self._alone:
            return [ok("data", f"{dataset.name}, digest {dataset.digest()}", digest=dataset.digest())]
        answers = nodes.ask("data", CHECK_S, data_digest, lambda _: (config.data,))
        return [*answers.faults, *judge.judge_data(answers.by_node, dataset.digest(), dataset.name)]

    def _own_disk(self) -> list[Finding]:
        dataset = None if self.config is None else self._data_set()
        place = self._known_place()
        if self.config is None or dataset is None or place is None:
            return []
        return surroundings.look_at_room(self.config, dataset, place)

    def _disks(self, nodes: Nodes) -> list[Finding]:
        config, needed = self.config, {}
        data = config.data if config else None
        dataset = None if config is None else self._data_set()
        if config is not None and dataset is not None:
            stored = image_bytes(dataset)[1] + plan_features(config, dataset.source, len(dataset.train_images))
            needed = {"cache": min(stored, config.data.cache_bytes)}
        answers = nodes.ask("disk", CHECK_S, room_of_node, lambda _: (data,))
        return [*answers.faults, *judge.judge_room("disk", answers.by_node, needed)]

    def _run_directory(self, nodes: Nodes | None) -> list[Finding]:
        try:
            place = self._place()
        except (ConfigError, OSError) as error:
            return [Finding(surroundings.RUN_DIR, "failure", one_line(error), surroundings.WRITE_FIX)]
        return surroundings.look_at_run_dir(place, nodes, CHECK_S)


def _asked(answers: Answers, judged: Callable[[dict[str, Any]], list[Finding]]) -> list[Finding]:
    return [*answers.faults, *judged(answers.by_node)]
