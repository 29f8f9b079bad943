"""Starts ranks that measure the links of a cluster, and judges what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.config import RunConfig
from jobs.diagnosis.findings import Finding, ok
from jobs.diagnosis.judge import judge_links
from jobs.diagnosis.links import LinkProbe, LinkReport
from jobs.diagnosis.nodes import Answers, Node, actor, gather, late

MOST_GPUS = 8
"""Ranks of the measurement on one node."""

PORTS_FIX = (
    "open all ports between the nodes (gloo and nccl take free ones), or name an interface that they share with "
    "cluster.interface"
)


class LinkCheck:
    """The ranks of one measurement: one on each node, or, for nccl, one on each GPU; two on a single node.

    Parameters
    ----------
    config: None: gloo, and Ray's own interface.
    limit_s: longest wait for all of it.

    Attributes
    ----------
    names: of the ranks.
    """

    def __init__(self, nodes: Sequence[Node], config: RunConfig | None, limit_s: float) -> None:
        self._config, self._limit_s = config, limit_s
        self._device = "cpu" if config is None else config.device
        self._seats = self._seats_of(nodes)
        self.names = [name for name, _ in self._seats]
        self._actors: list[Any] = []

    def _seats_of(self, nodes: Sequence[Node]) -> list[tuple[str, Node]]:
        def ranks(node: Node) -> int:
            if self._device == "cuda":
                return min(MOST_GPUS, int(node.resources.get("GPU", 0)))
            return 2 if len(nodes) == 1 else 1

        return [
            (node.name if ranks(node) == 1 else f"{node.name} #{number}", node)
            for node in nodes
            for number in range(ranks(node))
        ]

    def start(self) -> None:
        """Begin to start the processes; does not wait for them."""
        ranks, gpus = len(self._seats), int(self._device == "cuda")
        if ranks > 1:
            self._actors = [
                actor(LinkProbe, node, rank, ranks, self._device, self._limit_s, gpus=gpus)
                for rank, (_, node) in enumerate(self._seats)
            ]

    def run(self) -> list[Finding]:
        """Measure. Everything is over within the limit."""
        if not self._actors:
            return [ok("links", "one rank, which exchanges nothing")]
        deadline = time.monotonic() + self._limit_s
        interface = self._config.cluster.interface if self._config else None

        def ask(call: Callable[[int, Any], Any]) -> Answers:
            refs = {self.names[rank]: call(rank, each) for rank, each in enumerate(self._actors)}
            return gather("links", max(1.0, deadline - time.monotonic()), refs)

        listening = ask(lambda rank, each: each.listen.remote(interface, self._seats[rank][1].address))
        if listening.faults:
            return self._not_started(listening)
        places = [listening.by_node[name] for name in self.names]
        reached = ask(lambda _, each: each.reach.remote(places))
        apart = [
            Finding("links", "failure", f"{name} cannot connect to {self._at(partner, places)}: {why}", PORTS_FIX)
            for name, errors in reached.by_node.items()
            for partner, why in errors.items()
        ]
        if apart or reached.faults:
            return [*apart, *reached.faults]
        bound = gather("links", max(1.0, deadline - time.monotonic()), {"": self._actors[0].bind.remote(places[0][0])})
        if bound.faults:
            return bound.faults
        store = bound.by_node[""]
        return self._judged(ask(lambda _, each: each.measure.remote(store)))

    def _at(self, rank: int, places: Sequence[tuple[str, int]]) -> str:
        name, address = self.names[rank], places[rank][0]
        return name if name == address else f"{name} at {address}"

    def _not_started(self, listening: Answers) -> list[Finding]:
        silent = [fault for fault in listening.faults if fault.text == late("", self._limit_s).text]
        if self._device == "cuda" and silent:  # whoever has them may need them for long
            text = "not measured: GPUs are in use by others"
            return [Finding("links", "warning", text, "measure when they are free", fault.nodes) for fault in silent]
        return listening.faults

    def _judged(self, measured: Answers) -> list[Finding]:
        reports: dict[str, LinkReport] = measured.by_node
        speeds = [speed for report in reports.values() for speed in report.speeds]
        library = "nccl" if self._device == "cuda" else "gloo"
        faults = [
            Finding("links", "failure", f"{name}, {self._with_names(report.error)}", PORTS_FIX)
            for name, report in reports.items()
            if report.error
        ]
        return [*faults, *measured.faults, *judge_links(speeds, self.names, library)]

    def _with_names(self, error: str) -> str:
        """The partner's name for its number, at the beginning of an error."""
        for partner in range(len(self.names)):
            error = error.replace(f"with rank {partner}: ", f"with {self.names[partner]}: ")
        return error

    def end(self) -> None:
        """End the processes."""
        for each in self._actors:
            ray.kill(each)
