"""What a check has found: ok, a warning or a failure, in one line, with what mends it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from simmatch.documents import listed

Status = Literal["ok", "warning", "failure"]

MOST_NAMED = 4
"""Nodes named in one line."""


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes
    ----------
    check: its name.
    text: what was found.
    fix: what to do about it; empty where nothing needs to be done.
    nodes: where; none: of the cluster as a whole, or of the driver.
    values: figures, for JSON.
    """

    check: str
    status: Status
    text: str
    fix: str = ""
    nodes: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def where(self, nodes: int) -> str:
        """The text, behind those of `nodes` nodes that it is about.

        >>> full = Finding("disk", "warning", "full", nodes=("10.0.0.7", "10.0.0.8"))
        >>> full.where(3), full.where(2)
        ('on 10.0.0.7, 10.0.0.8: full', 'on both nodes: full')
        """
        if not self.nodes or nodes == 1:
            return self.text
        everywhere = "both nodes" if nodes == 2 else f"all {nodes} nodes"
        return f"on {everywhere if len(self.nodes) == nodes else named(self.nodes)}: {self.text}"


def ok(check: str, text: str, **values: Any) -> Finding:
    """A finding that is as it should be."""
    return Finding(check, "ok", text, values=values)


def named(nodes: Sequence[str]) -> str:
    """Some nodes in a sentence.

    >>> named(["a", "b"]), named(["a", "b", "c", "d", "e", "f"])
    ('a, b', 'a, b, c, d and 2 more')
    """
    return listed(nodes, MOST_NAMED)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that differ in their nodes only become one.

    >>> merged(Finding("disk", "warning", "full", nodes=(node,)) for node in "ab")[0].nodes
    ('a', 'b')
    """
    found: dict[tuple[str, str, str, str], Finding] = {}
    for finding in findings:
        key = finding.check, finding.status, finding.text, finding.fix
        known = found.get(key)
        found[key] = finding if known is None else replace(known, nodes=(*known.nodes, *finding.nodes))
    return list(found.values())
