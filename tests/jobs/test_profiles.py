"""Tables and files of profiles, from what ranks have reported; `tests.jobs.test_pretrain` has a real one in MLflow.

Oracle: the reported times themselves.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import jobs.pretrain
from cluster.config import RunConfig
from cluster.messages import LayerProfiled
from cluster.profiles import FOLDER
from cluster.summary import RunRecord
from cluster.tracking.events import ArtifactEvent
from cluster.tracking.spool import SPOOL_NAME, Spool
from cluster.tracking.tracker import Tracker
from jobs.mirror import Mirror
from jobs.profiles import profile_rows, profile_tables, with_earlier
from jobs.run_directory import choose
from jobs.run_results import RunResults
from simmatch.data.sources import Dataset
from simmatch.parts import ENCODING, OTHERS, PartTime
from simmatch.parts import PARTS as ALL_PARTS

UPDATES = 20

PARTS = tuple(part for part in ALL_PARTS if part not in (ENCODING, OTHERS))
"""Of layers that learn one after the other."""


def profile(layer: int, rank: int, *, first: int = 4, device_s: float = 0.0, **more: str) -> LayerProfiled:
    """The part number i takes (i + 1) · (rank + 1) ms of every update; a rank exchanges nothing in layer 1."""
    parts = {
        name: PartTime(1e-3 * UPDATES * (index + 1) * (rank + 1), device_s * UPDATES, UPDATES)
        for index, name in enumerate(PARTS)
    } | dict.fromkeys((ENCODING, OTHERS), PartTime(0.0, 0.0, 0))
    if layer == 1:
        parts |= dict.fromkeys(("exchange", "waiting"), PartTime(0.0, 0.0, 0))
    return LayerProfiled(layer, first, UPDATES, parts, [], more.get("file", f"layer-{layer}-rank-{rank}.json.gz"))


def record_of(*profiles: tuple[int, LayerProfiled]) -> RunRecord:
    record = RunRecord()
    for rank, one in profiles:
        record.add_profile(rank, one)
    return record


@pytest.fixture
def two_ranks() -> RunRecord:
    return record_of(*((rank, profile(layer, rank)) for layer in range(2) for rank in range(2)))


def test_parts_add_up_to_the_total(two_ranks: RunRecord) -> None:
    first, second = profile_tables(two_ranks, UPDATES)
    assert first.title == "layer 0: ms per update (4 to 23)"
    assert first.columns == ("part", "share", "rank 0", "rank 1")
    assert [row[0] for row in first.rows] == [*PARTS, "total"]
    assert [row[0] for row in second.rows] == [name for name in PARTS if name not in ("exchange", "waiting")] + [
        "total"
    ]
    for table in (first, second):
        for column in (2, 3):
            *parts, total = (float(row[column]) for row in table.rows)
            assert sum(parts) == pytest.approx(total, abs=0.005 * len(parts))
    assert first.rows[2] == ("dynamics", "5 %", "3.00", "6.00")  # 3 of 55
    assert first.rows[-1] == ("total", "100 %", "55.00", "110.00")


def test_fewer_updates_than_asked_for(two_ranks: RunRecord) -> None:
    assert profile_tables(two_ranks, 50)[0].title == "layer 0: ms per update (4 to 23; 50 asked for)"


def test_many_ranks_are_summarised() -> None:
    table = profile_tables(record_of(*((rank, profile(0, rank)) for rank in range(64))), UPDATES)[0]
    assert table.columns == ("part", "share", "mean", "least", "most")
    assert table.rows[0] == ("input", "2 %", "32.50", "1.00", "64.00")


def test_time_on_devices_has_a_table() -> None:
    tables = profile_tables(record_of((0, profile(0, 0, device_s=2e-3))), UPDATES)
    assert [table.title for table in tables] == [
        "layer 0: ms per update (4 to 23)",
        "layer 0: ms of kernels per update (4 to 23)",
    ]
    assert tables[1].rows[0] == ("input", "10 %", "2.00")


def test_a_layer_without_recorded_updates_has_no_table() -> None:
    record = RunRecord()
    record.add_profile(0, LayerProfiled(0, 1, 0, {}, [], problem="the layer had a single update left"))
    assert profile_tables(record, UPDATES) == []
    (row,) = profile_rows(record)
    assert (row["updates"], row["trace"], row["problem"]) == (0, None, "the layer had a single update left")


@pytest.mark.parametrize("width", [40, 80, 140])
def test_terminals(two_ranks: RunRecord, width: int) -> None:
    shown = io.StringIO()
    for table in profile_tables(record_of(*((rank, profile(0, rank)) for rank in range(8))), UPDATES):
        table.show(Console(file=shown, force_terminal=True, color_system=None, width=width))
    assert all(len(line) <= width for line in shown.getvalue().splitlines())
    assert {f"rank {rank}" for rank in range(8)} <= set(re.findall(r"rank \d", shown.getvalue()))
    assert "110.00" in shown.getvalue()


def test_layers_of_an_earlier_attempt_are_kept(tmp_path: Path, two_ranks: RunRecord) -> None:
    path = tmp_path / "summary.json"
    rows = profile_rows(record_of((0, profile(1, 0))))
    assert with_earlier(rows, path) == rows
    path.write_text(json.dumps(profile_rows(two_ranks)))
    assert [(row["layer"], row["rank"]) for row in with_earlier(rows, path)] == [(0, 0), (0, 1), (1, 0)]
    for damaged in ("", "[1, null]", "7", '{"layer": 0}', "null"):
        path.write_text(damaged)
        assert with_earlier(rows, path) == rows


@pytest.fixture
def results(make_config: Callable[..., RunConfig], digits: Dataset, tmp_path: Path) -> RunResults:
    config = make_config("tracking.enabled=false")
    start = choose(config, str(tmp_path / "run"), "auto")
    start.run_dir.mkdir()
    tracker = Tracker(start.run_dir, config.tracking)
    tracker.start("run", layers=2)
    lines: list[str] = []
    return RunResults(start, digits, tracker, Mirror(start.destination, start.run_dir), lines.append)


def test_files_and_their_way_to_mlflow(results: RunResults, two_ranks: RunRecord) -> None:
    two_ranks.add_profile(1, profile(1, 1, file=""))  # its trace could not be written
    tables = results.write_profiles(two_ranks, UPDATES)
    results.tracker.close()
    folder = results.start.run_dir / FOLDER
    rows = json.loads((folder / "summary.json").read_text())
    assert [(row["layer"], row["rank"], row["first_update"], row["updates"]) for row in rows] == [
        (layer, rank, 4, UPDATES) for layer in range(2) for rank in range(2)
    ]
    for row in rows:
        assert sum(part["host_s"] for part in row["parts"].values()) == pytest.approx(row["seconds"])
    assert (folder / "tables.md").read_text() == "\n".join(table.markdown() for table in tables)
    events = [
        event for event, _ in Spool(results.start.run_dir / SPOOL_NAME).read() if isinstance(event, ArtifactEvent)
    ]
    assert [(event.path, event.folder, event.layer) for event in events] == [
        (f"{FOLDER}/layer-0-rank-0.json.gz", FOLDER, 0),
        (f"{FOLDER}/layer-0-rank-1.json.gz", FOLDER, 0),
        (f"{FOLDER}/layer-1-rank-0.json.gz", FOLDER, 1),
        (f"{FOLDER}/summary.json", FOLDER, None),
        (f"{FOLDER}/tables.md", FOLDER, None),
    ]


def test_files_that_cannot_be_written_leave_the_tables(results: RunResults, two_ranks: RunRecord) -> None:
    (results.start.run_dir / FOLDER).write_text("in the way")
    lines: list[str] = []
    results.report = lines.append
    assert len(results.write_profiles(two_ranks, UPDATES)) == 2
    results.tracker.close()
    assert len(lines) == 1
    assert lines[0].startswith("the profile is not written: ")


@pytest.mark.parametrize(("asked", "expected"), [(0, []), (5, ["no profile: no update was recorded"])])
def test_without_a_profile_nothing_is_written(results: RunResults, asked: int, expected: list[str]) -> None:
    lines: list[str] = []
    results.report = lines.append
    assert results.write_profiles(RunRecord(), asked) == []
    assert lines == expected
    results.tracker.close()
    assert not (results.start.run_dir / FOLDER).exists()


@pytest.mark.parametrize("given", ["0", "-1", "many", "2.5", "101", "", "9" * 5000])
def test_a_number_that_cannot_be(given: str, digits_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        jobs.pretrain.main(["--config", str(digits_yaml), f"--profile={given}"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    expected = f"argument --profile: expected an integer from 1 to 100, got '{given}'"
    assert last == f"python -m jobs.pretrain: error: {expected}"
