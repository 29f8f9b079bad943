"""What facts of nodes mean for a run: functions from answers to findings, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from cluster.allocation import Allocation
from cluster.capacity import fitting, needs_of
from cluster.config import RunConfig
from cluster.layout import too_few_cpus
from cluster.text import count, size
from jobs.diagnosis.findings import Finding, Status, named, ok
from jobs.diagnosis.links import LinkSpeed
from jobs.diagnosis.node import Gpus, Room, Versions
from jobs.diagnosis.nodes import Node

PACKAGES = {
    "python": "Python", "ray": "Ray", "torch": "torch", "simmatch": "source of simmatch", "mlflow": "MLflow",
}  # fmt: skip

SAME_FIX = (
    "install one lock file, or use one image, on every node; submit the code with the job (python -m jobs.submit)"
)

CLOCK_S = 1.0
"""Difference between clocks that is told: records of MLflow and logs are compared by time."""

LITTLE_BYTES = 100 * 10**6
"""With less on a disk nothing works for long."""

SPILL_SHARE = 0.95
"""Of a disk in use, from which on Ray neither spills nor makes objects there."""

SLOW = 0.5
"""A link with less than this share of the median is told."""


def judge_versions(versions: Mapping[str, Versions]) -> list[Finding]:
    """One line if all are the same, else one for each package that differs.

    >>> same = Versions("3.11.2", "2.60.0", "2.14.1", "3.17.2", "f00d")
    >>> judge_versions({"a": same})[0].text
    'Python 3.11.2, Ray 2.60.0, torch 2.14.1, source of simmatch f00d, MLflow 3.17.2'
    """
    findings = []
    for key, package in PACKAGES.items():
        nodes_of: dict[str, list[str]] = {}
        for node, found in versions.items():
            nodes_of.setdefault(getattr(found, key), []).append(node)
        if len(nodes_of) > 1:
            groups = sorted(nodes_of.items(), key=lambda item: -len(item[1]))
            parts = [f"{found} on {named(nodes)}" for found, nodes in groups]
            # only the driver talks to MLflow
            status: Status = "warning" if key == "mlflow" else "failure"
            values = {"package": package, "versions": nodes_of}
            findings.append(Finding("versions", status, f"{package} differs: {'; '.join(parts)}", SAME_FIX, (), values))
    if findings or not versions:
        return findings
    first = next(iter(versions.values()))
    text = ", ".join(f"{package} {getattr(first, key)}" for key, package in PACKAGES.items())
    return [ok("versions", text, **vars(first))]


def judge_gpus(gpus: Mapping[str, Gpus], nodes: Sequence[Node], config: RunConfig | None) -> list[Finding]:
    """GPUs of nodes that Ray expects to have some, and whether the cluster has one for each rank."""
    offered = {node.name: int(node.resources.get("GPU", 0)) for node in nodes}
    total, wanted = sum(offered.values()), config.mesh.world_size if config and config.device == "cuda" else 0
    findings = [finding for node, found in gpus.items() for finding in _gpus_of(node, found, offered.get(node, 0))]
    if total < wanted:
        text = f"device: cuda needs {count(wanted, 'GPU')}, one for each rank; Ray offers {total}"
        reasons = {found.error for found in gpus.values() if found.error}
        if total == 0 and reasons:
            text += f": {'; '.join(sorted(reasons))}"
        fix = "start nodes with GPUs (ray start --num-gpus N), ask for fewer ranks (mesh), or --set device=cpu"
        findings.append(Finding("gpus", "failure", text, fix, values={"wanted": wanted, "offered": total}))
    elif total and config is not None and wanted < total:
        text = f"{count(total, 'GPU')} in the cluster; a run on {config.device} with {config.mesh} uses {wanted}"
        findings.append(Finding("gpus", "warning", text, "device: cuda, and more ranks in mesh"))
    if not findings:
        names = sorted({name for found in gpus.values() for name in found.names})
        drivers = sorted({found.driver for found in gpus.values() if found.names and found.driver})
        text = f"{count(total, 'GPU')}: {', '.join(names)}; driver {', '.join(drivers)}" if names else "none"
        needless = ", and device: cpu needs none" if config is not None and not names else ""
        findings.append(ok("gpus", text + needless, offered=total))
    return findings


def _gpus_of(node: str, found: Gpus, offered: int) -> list[Finding]:
    where, findings = (node,), []
    if found.driver_cuda is not None and found.torch_cuda is not None:
        major = int(found.torch_cuda.partition(".")[0])
        if found.driver_cuda[0] < major:
            text = (
                f"driver {found.driver or '?'} knows CUDA {found.driver_cuda[0]}.{found.driver_cuda[1]}, and torch was "
                f"built with CUDA {found.torch_cuda}"
            )
            fix = f"a driver for CUDA {major}, or a torch that was built with CUDA {found.driver_cuda[0]}"
            findings.append(Finding("gpus", "failure", text, fix, where))
    if len(found.names) < offered and not findings:
        why = f": {found.error}" if found.error else ""
        text = f"Ray offers {count(offered, 'GPU')}, torch sees {len(found.names)}{why}"
        findings.append(
            Finding("gpus", "failure", text, "see nvidia-smi on that node; start Ray with the GPUs there are", where)
        )
    if len(found.names) > offered:
        text = f"torch sees {count(len(found.names), 'GPU')}, Ray offers {offered}"
        findings.append(Finding("gpus", "warning", text, f"ray start --num-gpus {len(found.names)}", where))
    return findings


def most_ranks(node: Node, config: RunConfig) -> int:
    """How many of the ranks may be placed on a node."""
    return min(config.mesh.world_size, fitting(needs_of(config), dict(node.resources)))


def judge_nodes(nodes: Sequence[Node], config: RunConfig | None) -> list[Finding]:
    """Which nodes there are, and whether all ranks find a place on them; of GPUs `judge_gpus` tells."""
    names = [node.name for node in nodes]
    if not names:
        return []
    processors = sum(node.resources.get("CPU", 0) for node in nodes)
    text = f"{count(len(names), 'node')} with {count(int(processors), 'CPU')}: {named(names)}"
    values = {"nodes": names, "cpus": processors}
    if config is not None:
        bundle, ranks = {"CPU": needs_of(config)["CPU"]}, config.mesh.world_size
        room = sum(fitting(bundle, dict(node.resources)) for node in nodes)
        if room < ranks:
            text += f"; room for {room} of {count(ranks, 'rank')} of {count(config.cluster.cpus_per_rank, 'CPU')}"
            return [Finding("nodes", "failure", text, "start more nodes, or ask for fewer ranks (mesh)", values=values)]
    return [ok("nodes", text, **values)]


def judge_cores(found: Mapping[str, Allocation], nodes: Sequence[Node], config: RunConfig | None) -> list[Finding]:
    """CPUs that the allocation allows, against what Ray offers and the threads of the ranks that fit."""
    return [_cores_of(found[node.name], node, config) for node in nodes if node.name in found]


def _cores_of(own: Allocation, node: Node, config: RunConfig | None) -> Finding:
    offered = int(node.resources.get("CPU", 0))
    ranks = 0 if config is None else most_ranks(node, config)
    threads = None if config is None else config.cluster.threads_per_rank
    values = {"cpus": own.cpus, "offered": offered, "ranks": ranks, "threads_per_rank": threads}
    status: Status = "warning"
    text, fix = own.of_cpus, ""
    found = None if threads is None else too_few_cpus(own, ranks, threads)
    if found is not None:
        text, fix = f"{text} for up to {count(ranks, 'rank')}, {found[0]}", found[1]
    elif offered > own.cpus:
        text, fix = f"{text}, of which Ray offers {offered}: ranks would share them", f"ray start --num-cpus {own.cpus}"
    else:
        status, text = "ok", f"{text}, Ray offers {offered}"
    return Finding("cores", status, text, fix, (node.name,), values)


def judge_memory(
    found: Mapping[str, Allocation], nodes: Sequence[Node], config: RunConfig | None, rank_bytes: float | None
) -> list[Finding]:
    """Memory of each node's allocation against what its ranks need, as `--dry-run` computes it."""
    findings = []
    for node in nodes:
        if node.name not in found:
            continue
        memory_bytes = found[node.name].memory_bytes
        status: Status = "ok"
        text, fix, values = size(memory_bytes), "", {"memory_bytes": memory_bytes}
        ranks = 0 if config is None else most_ranks(node, config)
        if rank_bytes is not None and ranks:
            text += f"; {count(ranks, 'rank')} at most, of {size(rank_bytes)} each"
            values |= {"ranks": ranks, "rank_bytes": round(rank_bytes)}
            if ranks * rank_bytes > memory_bytes:
                status, fix = "failure", "fewer ranks on a node (cluster.cpus_per_rank), or less a rank: see --dry-run"
        findings.append(Finding("memory", status, text, fix, (node.name,), values))
    return findings


def judge_interfaces(found: Mapping[str, Allocation]) -> list[Finding]:
    """The interface of the exchanges on each node."""
    findings = []
    for node, own in found.items():
        if own.interface_error:
            fix = "cluster.interface: a name that every node has"
            findings.append(Finding("interface", "failure", own.interface_error, fix, (node,)))
            continue
        text = "; ".join(
            [f"{own.interface} {own.address}", *(f"{library}: {name}" for library, name in own.chosen.items())]
        )
        findings.append(
            Finding("interface", "ok", text, "", (node,), {"interface": own.interface, "address": own.address})
        )
    return findings


def judge_clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Clock of each node over the driver's, and how uncertain that is, in seconds."""
    findings = []
    for node, (offset, uncertain) in offsets.items():
        if abs(offset) - uncertain > CLOCK_S:
            text = f"the clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the driver's"
            fix = "synchronise the clocks (chrony, ntpd)"
            findings.append(Finding("clocks", "warning", text, fix, (node,), {"offset_s": offset}))
    if findings or not offsets:
        return findings
    most = max(max(0.0, abs(offset) - uncertain) for offset, uncertain in offsets.values())
    return [ok("clocks", f"differ by at most {most:.2g} s" if most else "agree", most_s=most)]


def judge_room(check: str, rooms: Mapping[str, Sequence[Room]], needed: Mapping[str, float]) -> list[Finding]:
    """Free disk; `needed`: what → bytes that a run writes there.

    Only the run directory's are missed: without room in the cache, encoded images stay in memory.
    """
    findings = []
    for node, found in rooms.items():
        for place in found:
            need, where = needed.get(place.what, 0.0), (node,) if node else ()
            used = 1 - place.free_bytes / max(place.total_bytes, 1)
            text = f"{place.what} {place.folder}: {size(place.free_bytes)} free of {size(place.total_bytes)}"
            status: Status = "ok"
            fix = ""
            if place.free_bytes < LITTLE_BYTES or (need > place.free_bytes and place.what != "cache"):
                status, fix = "failure", "make room there, or name another disk"
            elif need > place.free_bytes:
                status, fix = "warning", "make room there, or set data.cache_dir; what does not fit stays in memory"
            elif place.what == "Ray's files" and used > SPILL_SHARE:
                text += f", more than {SPILL_SHARE:.0%} used: Ray makes no objects there"
                status, fix = "warning", "make room there, or ray start --temp-dir on another disk"
            if need:
                text += f", a run writes {size(need)}"
            values = {"what": place.what, "free_bytes": place.free_bytes, "needed_bytes": need}
            findings.append(Finding(check, status, text, fix, where, values))
    return findings


def judge_data(digests: Mapping[str, str], expected: str, title: str) -> list[Finding]:
    """The data set of each node against the driver's."""
    other = {node: digest for node, digest in digests.items() if digest != expected}
    if not other:
        return [ok("data", f"{title}, digest {expected}", digest=expected)] if digests else []
    fix = "the same files on every node, or one place for all: data.path with a URI, or a shared folder (SIMMATCH_DATA)"
    return [
        Finding("data", "failure", f"{title} has the digest {digest}, the driver's has {expected}", fix, (node,))
        for node, digest in other.items()
    ]


def judge_links(speeds: Sequence[LinkSpeed], names: Sequence[str], library: str) -> list[Finding]:
    """Bandwidth and latency between ranks, `names` being where each of them runs; the slowest is named."""
    if not speeds:
        return []
    slowest = min(speeds, key=lambda speed: speed.bytes_per_s)
    latest = max(speeds, key=lambda speed: speed.latency_s)
    middle = median(speed.bytes_per_s for speed in speeds)
    fastest = max(speed.bytes_per_s for speed in speeds)

    def name(speed: LinkSpeed) -> str:
        return f"{names[speed.source]} → {names[speed.target]}"

    links = [
        {
            "from": names[speed.source],
            "to": names[speed.target],
            "bytes_per_s": speed.bytes_per_s,
            "latency_s": speed.latency_s,
        }
        for speed in speeds
    ]
    values = {"library": library, "links": links}
    pairs = len(speeds) // 2
    text = f"{library}, {count(pairs, 'pair')}: {_range(slowest.bytes_per_s, fastest)}"
    if pairs > 1:
        text += f", slowest {name(slowest)}"
    text += f"; latency up to {1e3 * latest.latency_s:.2g} ms" + (f", {name(latest)}" if pairs > 1 else "")
    if slowest.bytes_per_s < SLOW * middle:
        text += f"; the median is {size(middle)}/s"
        fix = "look at the cable, the switch and other traffic of that pair; every exchange waits for the slowest link"
        return [Finding("links", "warning", text, fix, values=values)]
    return [Finding("links", "ok", text, values=values)]


def _range(low: float, high: float) -> str:
    return f"{size(low)}/s" if high < 1.05 * low else f"{size(low)}/s to {size(high)}/s"
