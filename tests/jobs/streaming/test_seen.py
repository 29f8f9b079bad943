"""Curves, report, and that nothing which is seen holds up or changes what is learnt."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.tracking.events import MetricsEvent, line_of
from jobs import stream
from jobs.streaming import curves, seen
from jobs.streaming.curves import Curves, row
from jobs.streaming.history import History, load, points_of
from jobs.streaming.job import public
from jobs.streaming.outcome import Event
from jobs.streaming.page import PageConfig, ReportConfig
from jobs.streaming.report import costs, plain, report, text
from jobs.streaming.seen import Seen
from jobs.streaming.totals import CandidateTotals, Point, Spent
from simmatch.config import ConfigError
from tests.jobs.streaming.outcomes import outcomes
from tests.jobs.streaming.streams import small

SPENT = Spent(0.05, 0.02, 0)
HOSTILE = "|<script>alert(1)</script> [x](javascript:1) `c` **b** \u202e\n# h"


class Notebook:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.tagged: dict[str, str] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def tags(self, values: Mapping[str, str]) -> None:
        self.tagged |= values


def recorded(notebook: Notebook, run_dir: Path, batches: int, part: range | None = None, **options: Any) -> History:
    """A stream whose curves are recorded there."""
    known, told = History("line 4"), Curves(notebook, run_dir)  # type: ignore[arg-type]
    for outcome, usage in outcomes(batches, part=part, **options):
        if known.add(outcome, usage, SPENT):
            assert known.kept.latest is not None
            told.add(outcome, known.kept.latest, known.kept.counts)
    return known


def test_curves_are_means_since_the_row_before(tmp_path: Path) -> None:
    """Against sums over the batches between two rows."""
    notebook = Notebook()
    recorded(notebook, tmp_path, 200)
    batches = [(outcome.metrics, usage) for outcome, usage in outcomes(200)]
    every = [event for outcome, _ in outcomes(200) for event in outcome.events]
    events = {event.number for event in every if event.kind != "novelty"}
    steps = [step for step, _ in notebook.rows]
    assert set(steps) >= events
    assert steps == sorted(set(steps))
    before = 0
    for step, values in notebook.rows:
        part = [(metrics, usage) for metrics, usage in batches if before < metrics.number <= step]
        online = [metrics.candidates["online"] for metrics, _ in part]
        answered, right = sum(each.answered for each in online), sum(each.right for each in online)
        assert values["accuracy/online"] == pytest.approx(right / answered)
        seconds = sum(usage.seconds["online"] for _, usage in part)
        assert values["us_per_record/online"] == pytest.approx(1e6 * seconds / (32 * len(part)))
        assert values["records_per_second"] == pytest.approx(32 / 0.05)
        assert values["labels_used"] == 8 * step / 32
        before = step
    assert notebook.rows[-1][1]["events/champion"] == 1
    assert notebook.tagged["simmatch.stream.champion"].startswith("record 1,088: online answers in place of frozen")


def test_a_long_stream_has_few_rows() -> None:
    """A row for every thousandth part: a thousand million records make less than ten thousand."""
    number = rows = 0
    while number < 10**9:
        number, rows = curves._next(number), rows + 1
    assert 5_000 < rows < 10_000


def test_events_of_every_batch_wait_for_the_next_row(tmp_path: Path) -> None:
    """Else the records for MLflow would grow with each batch, however long the stream is."""
    notebook = Notebook()
    told, known = Curves(notebook, tmp_path), History("line 4")  # type: ignore[arg-type]
    for index, (outcome, usage) in enumerate(outcomes(500)):
        events = (Event(index, "fault", outcome.metrics.number, 0.0, "expected JSON", {}),)
        known.add(replace(outcome, events=events), usage, SPENT)
        assert known.kept.latest is not None
        told.add(replace(outcome, events=events), known.kept.latest, known.kept.counts)
    assert [step for step, _ in notebook.rows] == list(range(1024, 16_001, 1024))
    assert notebook.rows[-1][1]["events/fault"] == 480
    assert notebook.tagged == {"simmatch.stream.fault": "record 15,360: expected JSON"}


def test_a_restart_records_no_row_again(tmp_path: Path) -> None:
    """The spool holds the rows of a process that was killed after batch 150; its snapshot was of batch 99."""
    whole, first, second = Notebook(), Notebook(), Notebook()
    recorded(whole, tmp_path / "whole", 200)
    known = recorded(first, tmp_path / "killed", 200, range(1, 151))
    lines = [line_of(MetricsEvent(time_ms=0, step=step, values=values)) for step, values in first.rows]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "events.jsonl").write_bytes(b"".join(lines))
    snapshot = History("line 4")
    for outcome, usage in outcomes(200, part=range(1, 100)):
        snapshot.add(outcome, usage, SPENT)
    told = Curves(second, tmp_path / "killed")  # type: ignore[arg-type]
    for outcome, usage in outcomes(200, part=range(100, 201)):
        snapshot.add(outcome, usage, SPENT)
        assert snapshot.kept.latest is not None
        told.add(outcome, snapshot.kept.latest, snapshot.kept.counts)
    steps = [step for step, _ in (*first.rows, *second.rows)]
    assert steps == sorted(set(steps))
    assert known.batch == 150
    assert second.rows[-1][0] == whole.rows[-1][0]


def test_names_that_mlflow_does_not_take(tmp_path: Path) -> None:
    notebook = Notebook()
    recorded(notebook, tmp_path, 60, names=("a(b)", "c%d", "e"))
    assert all(re.fullmatch(r"[\w .:/-]+", name) for _, values in notebook.rows for name in values)
    assert "accuracy/a_b_" in notebook.rows[0][1]


def test_a_row_holds_only_what_is_known() -> None:
    values = row(Point(), Point(batch=1, records=5))
    assert "accuracy" not in values
    assert "novelty" not in values
    assert values["labels_used"] == 0


class Config:
    page, report = PageConfig(), ReportConfig(price_cpu_hour=0.36, price_gb_month=0.5, price_label="€|")


def test_costs_against_hand_written_sums() -> None:
    latest = Point(records=50_000, journal_bytes=10**9)
    found = costs(CandidateTotals(seconds=100.0, state_bytes=4 * 10**9), latest, Config.report)
    assert found == {
        "processor": pytest.approx(100.0 / 3600 * 0.36 / 50),
        "storage": pytest.approx(0.5 / 50),
        "sum": pytest.approx(0.0102),
        "state": pytest.approx(2.0),
    }
    nothing = costs(CandidateTotals(), Point(), Config.report)
    assert (nothing["processor"], nothing["storage"], nothing["sum"]) == (None, None, None)


def test_the_report_says_what_a_decision_needs(tmp_path: Path) -> None:
    known = History("line 4")
    for outcome, usage in outcomes(600):
        known.add(outcome, usage, SPENT)
    known.write(tmp_path, "running", 1.7e9)
    path = report(tmp_path, Config())  # type: ignore[arg-type]
    content = path.read_text()
    right = sum(outcome.metrics.candidates["frozen"].right for outcome, _ in outcomes(600))
    assert f"| frozen | {100 * right / (600 * 8):.1f} % |" in content
    assert "-8.00 to -2.00" in content
    assert "- frozen: worse than the champion." in content
    seconds = sum(usage.seconds["frozen"] for _, usage in outcomes(600))
    assert f"| frozen | {seconds:.1f} | {1e6 * seconds / (600 * 32):.0f} |" in content
    assert (tmp_path / "figures" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_text_in_a_report(tmp_path: Path) -> None:
    """Every table has the cells of its heading, and no text from outside is markup."""
    known = History(f"line{HOSTILE}")
    names = tuple(f"{name}{HOSTILE}" for name in ("online", "frozen", "random"))
    for outcome, usage in outcomes(100, names=names, text=HOSTILE):
        known.add(outcome, usage, SPENT)
    content = text(known.kept, points_of(known.kept), Config())  # type: ignore[arg-type]
    assert "<script" not in content
    assert "\u202e" not in content
    assert not re.search(r"(?<!\\)\[x", content)
    assert [line for line in content.splitlines() if line.startswith("#")] == [f"# Stream {plain(known.kept.name)}"]
    for block in re.findall(r"(?:^\|.*\n)+", content, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


@pytest.mark.parametrize("content", [None, "", '{"format": 1}'])
def test_a_report_of_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "seen.json").write_text(content)
    with pytest.raises(ConfigError, match="--run-dir: expected the folder of a stream that has learnt from a batch"):
        report(tmp_path, Config())  # type: ignore[arg-type]


def test_a_full_disk_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    watcher = Seen(tmp_path, small(page={"every_batches": 1}), lines.append)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(seen, "write_whole", full)
        patch.setattr("jobs.streaming.history.write_whole", full)
        for outcome, usage in outcomes(50, part=range(1, 31)):
            watcher.add(outcome, usage)
        watcher.sync()
    assert len(lines) == 1
    assert "No space left on device; the stream goes on" in lines[0]
    for outcome, usage in outcomes(50, part=range(31, 51)):
        watcher.add(outcome, usage)
    watcher.close("ended")
    kept = load(tmp_path)
    assert kept is not None
    assert kept.latest is not None
    assert (kept.state, kept.latest.batch, kept.latest.records) == ("ended", 50, 1600)
    assert "1,600 records in 50 batches" in (tmp_path / "page.html").read_text()


def test_pages_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], 0
    monkeypatch.setattr(seen.time, "monotonic", lambda: now[0])
    watcher = Seen(tmp_path, small(page={"every_batches": 1}), print)

    def write() -> None:
        nonlocal written
        now[0] += 0.1
        written += 1

    watcher._write_files = write  # type: ignore[method-assign]
    for outcome, usage in outcomes(2000):
        now[0] += 0.01
        watcher.add(outcome, usage)
    assert 0.03 < 0.1 * written / now[0] < 0.06


# -- the job ----------------------------------------------------------------------------------------------------------


def waves(path: Path, count: int) -> None:
    """A file of windows of two kinds."""
    import numpy as np

    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(count):
            kind = int(draw.integers(2))
            wave = np.sin((1 + 2 * kind) * 0.3 * np.arange(32) + 6 * draw.random())
            values = [[float(value)] for value in wave]
            file.write(json.dumps({"id": f"r{number}", "time": number, "values": values, "label": "ab"[kind]}) + "\n")


def options(tmp_path: Path, *more: str) -> list[str]:
    words = ["--config", "jobs/configs/stream_small.yaml", "--run-dir", str(tmp_path / "run")]
    for assignment in (f"source.lines.path={tmp_path / 'waves.jsonl'}", "tracking.enabled=false", *more):
        words += ["--set", assignment]
    return words


def test_a_job_leaves_page_model_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simmatch import load_model

    waves(tmp_path / "waves.jsonl", 200)
    assert stream.main(options(tmp_path)) == 0
    run_dir = tmp_path / "run"
    page = (run_dir / "page.html").read_text()
    assert "200 records" in page
    assert '<span class="state other"><bdi>ended</bdi></span>' in page
    assert load_model(run_dir / "model").source.width == 32
    capsys.readouterr()
    assert stream.main(["--run-dir", str(run_dir), "--report"]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.md")
    assert "| main (champion) |" in (run_dir / "report.md").read_text()


@pytest.mark.parametrize(
    ("assignments", "what"),
    [
        (("answers.http={token_env: NO_SUCH_TOKEN}",), "answers.http.token_env: expected"),
        (("answers.http={host: 203.0.113.7, token_env: STREAM_TEST_TOKEN}",), "answers.http: expected an address"),
        (("events.webhook={url: 'https://example.org', secret_env: NO_SUCH}",), "events.webhook.secret_env: expected"),
        (("events.webhook={url: 'gopher://example.org'}",), "events.webhook.url"),
    ],
)
def test_nothing_is_started_with_a_bad_configuration(
    assignments: tuple[str, ...],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STREAM_TEST_TOKEN", "a token of the test, long")
    waves(tmp_path / "waves.jsonl", 1)
    assert stream.main(options(tmp_path, *assignments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {what}") or what in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "journal").exists()


def test_no_secret_of_a_webhook_is_written_down() -> None:
    webhook = {"url": "https://example.org/hook?token=5ecret&plant=4", "secret_env": "SOME_SECRET"}
    values = public(small(events={"webhook": webhook}))
    assert values["events"]["webhook"]["url"] == "https://example.org/hook?token=***&plant=4"
    assert "5ecret" not in json.dumps(values)
