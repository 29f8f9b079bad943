"""Copies of snapshots, and the room that a journal may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import AnyPath
from jobs.streaming import keeper, snapshots
from jobs.streaming.config import StreamConfig
from jobs.streaming.journal import Journal
from jobs.streaming.service import Service
from tests.jobs.streaming.streams import ListSource, Notes, small, waves


def run(config: StreamConfig, run_dir: Path, count: int) -> tuple[Journal, list[str]]:
    """A stream of so many records."""
    journal, told = Journal(run_dir / "journal", config.journal.segment_bytes), list[str]()
    try:
        journal.open()
        service = Service(config, run_dir, journal, Notes(), told.append)
        service.catch_up()
        service.run(ListSource(waves(count), set()))
        service.close(30.0)
    finally:
        journal.close()
    return journal, told


def test_snapshots_are_copied(tmp_path: Path) -> None:
    config = small(snapshot={"every_batches": 4, "copy_to": str(tmp_path / "copies")})
    run(config, tmp_path / "run", 100)
    newest = snapshots.listed(tmp_path / "run" / "snapshots")[-1]
    copies = snapshots.listed(tmp_path / "copies")
    assert 1 <= len(copies) <= 2
    assert copies[-1].name == newest.name
    assert snapshots.load(copies[-1]).digest == snapshots.load(newest).digest


def test_a_place_for_copies_that_is_away_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(path: AnyPath, content: bytes) -> None:
        raise OSError(f"{path.parent}: no answer")

    monkeypatch.setattr(keeper, "write_whole", away)
    config = small(snapshot={"every_batches": 2, "copy_to": str(tmp_path / "copies")})
    _, told = run(config, tmp_path / "run", 100)
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path / 'copies'} takes no copy of a snapshot: ")
    assert len(snapshots.listed(tmp_path / "run" / "snapshots")) == config.snapshot.keep


def test_a_budget_removes_what_no_snapshot_needs(tmp_path: Path) -> None:
    room = {"segment_bytes": 4096, "max_bytes": 20_000}
    journal, told = run(small(journal=room), tmp_path / "budget", 300)
    assert told == []
    assert journal.nbytes <= 20_000
    assert journal.first > 0
    whole, _ = run(small(journal={"segment_bytes": 4096}), tmp_path / "whole", 300)
    assert (whole.first, whole.nbytes > 40_000) == (0, True)


def test_a_budget_that_snapshots_exceed_is_told_once(tmp_path: Path) -> None:
    _, told = run(small(journal={"segment_bytes": 4096, "max_bytes": 5000}), tmp_path, 200)
    assert len(told) == 1
    assert "more than journal.max_bytes: snapshots need what is there" in told[0]
