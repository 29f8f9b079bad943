"""Profiles of a run, `--profile N`: what ranks recorded, as rows of `profile/summary.json` and as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.messages import LayerProfiled
from cluster.summary import RunRecord
from jobs.reporting import Table
from simmatch.documents import DocumentError, load_json
from simmatch.parts import PARTS, PartTime

MOST_RANKS = 8
"""With a column each; of more ranks the table shows the mean and the extremes."""


def profile_rows(record: RunRecord) -> list[dict[str, Any]]:
    """One row for every layer and rank; times are in seconds, over all recorded updates."""
    return [
        {
            "layer": layer,
            "rank": rank,
            "first_update": profile.first,
            "updates": profile.updates,
            "seconds": sum(time.host_s for time in profile.parts.values()),
            "parts": {name: vars(time) for name, time in profile.parts.items()},
            "kernels": profile.kernels,
            "trace": profile.file or None,
            "problem": profile.problem or None,
        }
        for layer, rank, profile in _profiles(record)
    ]


def with_earlier(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows, after those of layers that an earlier attempt of the run has profiled."""
    try:
        earlier = load_json(path.read_bytes())
    except (FileNotFoundError, DocumentError):
        return rows
    if not isinstance(earlier, list):
        return rows
    known = {row["layer"] for row in rows}
    kept = [row for row in earlier if isinstance(row, dict) and row.get("layer") not in known | {None}]
    return [*kept, *rows]


def profile_tables(record: RunRecord, asked: int) -> list[Table]:
    """Where the time of every layer's recorded updates went, in milliseconds per update."""
    tables = []
    for layer in sorted(record.profiles):
        ranks = {rank: profile for _, rank, profile in _profiles(record, layer) if profile.updates}
        if ranks:
            one = next(iter(ranks.values()))
            which = f"{one.first} to {one.first + one.updates - 1}"
            if one.updates < asked:
                which += f"; {asked} asked for"
            tables.append(_table(f"layer {layer}: ms per update ({which})", ranks, lambda time: time.host_s))
            if any(time.device_s for profile in ranks.values() for time in profile.parts.values()):
                title = f"layer {layer}: ms of kernels per update ({which})"
                tables.append(_table(title, ranks, lambda time: time.device_s))
    return tables


def _profiles(record: RunRecord, *layers: int) -> Iterator[tuple[int, int, LayerProfiled]]:
    """(layer, rank, profile), in order."""
    for layer in layers or sorted(record.profiles):
        for rank, profile in sorted(record.profiles[layer].items()):
            yield layer, rank, profile


def _table(title: str, ranks: dict[int, LayerProfiled], seconds: Callable[[PartTime], float]) -> Table:
    """The parts that took time, and their total."""
    ms = {
        name: [1e3 * seconds(profile.parts[name]) / profile.updates for profile in ranks.values()]
        for name in PARTS
        if any(seconds(profile.parts[name]) > 0 for profile in ranks.values())
    }
    ms["total"] = [sum(column) for column in zip(*ms.values(), strict=True)]
    whole = sum(ms["total"]) or 1.0
    few = len(ranks) <= MOST_RANKS
    columns = [f"rank {rank}" for rank in ranks] if few else ["mean", "least", "most"]
    rows = []
    for name, values in ms.items():
        shown = values if few else [sum(values) / len(values), min(values), max(values)]
        rows.append((name, f"{100 * sum(values) / whole:.0f} %", *(f"{value:.2f}" for value in shown)))
    return Table(title, ("part", "share", *columns), rows)
