"""Asks every node of a Ray cluster at once; a node that does not answer in time is named, not waited for."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.failures import classify
from cluster.redaction import Redactor, one_line
from jobs.diagnosis.findings import Finding

ROOM = 32
"""Questions that a node answers at a time: one that hangs keeps no other waiting."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster.

    Attributes
    ----------
    name: for messages: its address, and where several have the same, the beginning of its id.
    resources: that Ray offers there.
    """

    id: str
    name: str
    address: str
    resources: Mapping[str, float]


@dataclass
class Answers:
    """What nodes have said to one question.

    Attributes
    ----------
    by_node: name of the node → its answer.
    faults: a failure for each node that has raised, or not answered.
    """

    by_node: dict[str, Any] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)


class Nodes(Protocol):
    """All nodes that can be asked."""

    nodes: list[Node]

    def ask(
        self, check: str, limit_s: float, question: Callable[..., Any], arguments: Callable[[Node], Sequence[Any]] = ...
    ) -> Answers:
        """`question(*arguments(node))` in a process of every node, for the check of this name."""
        ...


def nothing(_: Node) -> Sequence[Any]:
    """No arguments."""
    return ()


class Probe:
    """A process of a node, made into an actor."""

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer; an error in one line, without secrets of this node."""
        try:
            return question(*arguments)
        except Exception as error:
            raise RuntimeError(Redactor(os.environ)(f"{one_line(error) or type(error).__name__}")) from None


def living() -> list[Node]:
    """The nodes of the cluster that this process has joined, by their addresses."""
    import ray

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in known if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
    same = Counter(node["NodeManagerAddress"] for node in alive)
    return [
        Node(
            node["NodeID"],
            address if same[address] == 1 else f"{address} ({node['NodeID'][:6]})",
            address,
            node["Resources"],
        )
        for node in alive
        for address in (node["NodeManagerAddress"],)
    ]


class RayNodes:
    """A process on each node, outside of what Ray counts, so that a busy cluster can be asked too.

    Attributes
    ----------
    nodes: that have answered to `start`.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self._actors: dict[str, Any] = {}

    def start(self, limit_s: float) -> list[Finding]:
        """Start them. Nodes that do not answer are left out from here on; returns a failure for each."""
        self._actors = {node.name: actor(Probe, node, max_concurrency=ROOM) for node in self.nodes}
        answers = self.ask("nodes", limit_s, os.getpid)
        self.nodes = [node for node in self.nodes if node.name in answers.by_node]
        return answers.faults

    def ask(
        self,
        check: str,
        limit_s: float,
        question: Callable[..., Any],
        arguments: Callable[[Node], Sequence[Any]] = nothing,
    ) -> Answers:
        refs = {node.name: self._actors[node.name].ask.remote(question, *arguments(node)) for node in self.nodes}
        return gather(check, limit_s, refs)

    def end(self) -> None:
        """End the processes."""
        import ray

        for each in self._actors.values():
            ray.kill(each)


def actor(kind: type[Any], node: Node, *arguments: Any, gpus: int = 0, **options: Any) -> Any:
    """An actor of this class on a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node.id, soft=False)
    made = ray.remote(kind).options(
        num_cpus=0, num_gpus=gpus, max_restarts=0, scheduling_strategy=where, runtime_env=_THREADS, **options
    )
    return made.remote(*arguments)


_THREADS = {"env_vars": {"OMP_NUM_THREADS": "1"}}
"""Several threads of several processes on busy processors wait for each other more than they work."""


def gather(check: str, limit_s: float, refs: Mapping[str, Any]) -> Answers:
    """Answers of nodes, by name, that come in time."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    answers, waiting = Answers(), {ref: name for name, ref in refs.items()}
    deadline = time.monotonic() + limit_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for ref in ray.wait(list(waiting), num_returns=1, timeout=left_s)[0]:
            name = waiting.pop(ref)
            try:
                answers.by_node[name] = ray.get(ref)
            except RayTaskError as error:
                answers.faults.append(_fault(check, name, str(error.cause or error)))
            except RayError as error:
                answers.faults.append(_fault(check, name, f"its process was lost: {classify(error).message}"))
    answers.by_node = {name: answers.by_node[name] for name in refs if name in answers.by_node}
    answers.faults += [late(check, limit_s, name) for name in waiting.values()]
    return answers


def _fault(check: str, node: str, why: str) -> Finding:
    from cluster.group import CODE_HINT, NO_CODE  # imports ray, whose environment is set by now

    fix = f"{CODE_HINT}, here {Path.cwd()}" if why.endswith(NO_CODE) else ""
    return Finding(check, "failure", one_line(why), fix, (node,))


LATE_FIX = "look at that node: a disk, folder or network that hangs, or no processor free"


def late(check: str, limit_s: float, *nodes: str) -> Finding:
    """The failure of a check that hangs."""
    return Finding(check, "failure", f"no answer within {limit_s:.0f} s", LATE_FIX, nodes)
