"""The history of a stream and its page: exact sums in bounded room, and nothing from outside that a browser obeys."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.streaming import history
from jobs.streaming.charts import Line, chart, text, ticks
from jobs.streaming.history import KEPT, History, points_of
from jobs.streaming.outcome import CandidateMetrics
from jobs.streaming.page import PageConfig, render
from jobs.streaming.totals import Spent, windowed
from tests.jobs.streaming.outcomes import NAMES, outcomes

SPENT = Spent(0.03, 0.02, 1)
HOSTILE = "</td></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00\x1b[2J\ud800"
VOID = {"meta", "link", "br", "img", "input", "hr", "path"}


def told(batches: int, **options: Any) -> History:
    known = History("line 4")
    for outcome, usage in outcomes(batches, **options):
        assert known.add(outcome, usage, SPENT)
    return known


@pytest.mark.parametrize("batches", [1, 7, 2 * KEPT, 2 * KEPT + 1, 5 * KEPT + 3])
def test_sums_are_exact_however_few_points_are_kept(batches: int) -> None:
    """Against plain sums over all batches, at every point that is left."""
    sums: dict[int, tuple[int, int, int, int]] = {}
    records = labels = right = drifts = 0
    for outcome, _ in outcomes(batches):
        metrics = outcome.metrics
        records, labels = records + metrics.records, labels + metrics.labels
        right += metrics.candidates["online"].right
        drifts += sum(event.kind == "drift" for event in outcome.events)
        sums[metrics.batch] = records, labels, right, drifts
    kept = told(batches).kept
    points = points_of(kept)
    assert len(points) <= 2 * KEPT + 1
    assert points[-1].batch == batches
    for point in points:
        online = point.candidates["online"]
        assert (point.records, point.labels, online.right, online.drifts) == sums[point.batch]
        assert point.elapsed_s == pytest.approx(0.03 * point.batch)
    assert {point.batch % kept.step for point in kept.points} <= {0}
    assert len(kept.points) == batches // kept.step


def test_the_greatest_lag_is_never_left_out() -> None:
    known = History()
    for outcome, usage in outcomes(3 * KEPT):
        known.add(outcome, replace(usage, lag_s=77.0 if outcome.metrics.batch == 100 else 0.5), SPENT)
    assert max(point.lag_s or 0.0 for point in points_of(known.kept)) == 77.0


def test_who_was_the_champion_scores_not_who_became_it() -> None:
    known, right = History(), 0
    answering = "frozen"
    for outcome, usage in outcomes(60):
        right += outcome.metrics.candidates[answering].right
        answering = outcome.metrics.champion
        known.add(outcome, usage, SPENT)
    latest = points_of(known.kept)[-1]
    assert latest.right == right
    assert [switch.champion for switch in known.kept.switches] == ["frozen", "online"]


def test_batches_that_come_again_count_once(tmp_path: Path) -> None:
    """A process is killed after batch 200; its snapshot was taken after batch 149."""
    killed = told(300, part=range(1, 201))
    killed.write(tmp_path, "running", 1.0)
    restarted = History("line 4")
    restarted.load(tmp_path)
    for outcome, usage in outcomes(300, part=range(150, 301)):
        assert restarted.add(outcome, usage, SPENT) == (outcome.metrics.batch > 200)
    whole = told(300).kept
    assert restarted.kept == whole.model_copy(update={"state": "running", "written": 1.0})


@pytest.mark.parametrize("content", [b"", b"{}x", b'{"format": 2}', b'{"points": 3}', b"[]", b'{"format": 1, "x": 1}'])
def test_a_file_that_is_not_ours_is_left_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / history.FILE).write_bytes(content)
    assert history.load(tmp_path) is None


def test_values_that_are_not_finite_harm_no_file(tmp_path: Path) -> None:
    known = History()
    for outcome, usage in outcomes(4):
        bad = {
            name: replace(each, novelty=float("nan"), threshold=float("inf"), difference=(float("nan"), 0.0, 1.0))
            for name, each in outcome.metrics.candidates.items()
        }
        metrics = replace(outcome.metrics, candidates=bad, time=float("nan"))
        known.add(replace(outcome, metrics=metrics), replace(usage, lag_s=float("inf")), SPENT)
    known.write(tmp_path, "running", 1.0)
    assert history.load(tmp_path) == known.kept
    assert "NaN" not in (tmp_path / history.FILE).read_text()
    assert "nan" not in re.sub(r"<style>.*</style>", "", render(known.kept, PageConfig()))


def test_windowed() -> None:
    totals = [(n * n, 10.0 * n) for n in range(1, 50)]
    for index, value in enumerate(windowed(totals, least=30)):
        above, below = totals[index - 3] if index > 2 else (0, 0)
        assert value == pytest.approx((totals[index][0] - above) / (totals[index][1] - below))


class Page(HTMLParser):
    """Elements and attributes of a page, as a browser sees them; fails where tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)


@pytest.mark.parametrize("batches", [0, 1, 2, 900])
def test_a_page_needs_nothing_from_elsewhere(batches: int) -> None:
    html = render(told(batches).kept, PageConfig())
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "form", "img", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links == ["data:,"]  # keeps a browser from asking for an icon
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html) < 200_000


def test_hostile_text_stays_text() -> None:
    """Names, classes, ids and reasons with markup, quotes, control characters and half a surrogate pair."""
    names = tuple(f"{name}{HOSTILE}" for name in NAMES)
    known = History(f"stream{HOSTILE}")
    for outcome, usage in outcomes(300, names=names, text=HOSTILE):
        known.add(outcome, usage, SPENT)
    known.kept = known.kept.model_copy(update={"state": f"failed: {HOSTILE}"})
    html = render(known.kept, PageConfig())
    html.encode(errors="strict")
    page, plain = Page(html), Page(render(told(300).kept, PageConfig()))
    assert {"script", "img"} & set(page.tags) == set()
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert not any(each in html for each in ("\u202e", "\x00", "\x1b"))
    assert any("alert(1)" in each for each in page.data), "it is shown, as text"


def test_a_year_takes_no_more_room_than_an_hour(tmp_path: Path) -> None:
    """Sizes depend on the number of points only, and a long stream has less than twice as many as a short one."""
    names = tuple(f"candidate {index} of a comparison" for index in range(10))
    known = told(2 * KEPT, names=names)
    known.write(tmp_path, "running", 1.0)
    html = render(known.kept, PageConfig())
    assert len(html.encode()) < 1_000_000
    assert len(told(9 * KEPT).kept.points) <= 2 * KEPT
    assert len(json.dumps(known.kept.model_dump())) < 4_000_000


@pytest.mark.parametrize(
    "ends", [(0.0, 0.0), (1e9, 1e9 + 1), (-5.0, 7.0), (0.62, 0.97), (1600.0, 1600.0000001), (0.0, 1e-12), (3.0, 2.0)]
)
def test_ticks_hold_what_is_drawn(ends: tuple[float, float]) -> None:
    low, high = ends
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert found == sorted(set(found))
    assert found[0] <= min(low, high) + 1e-9 * abs(low)
    assert found[-1] >= max(low, high) - 1e-9 * abs(high)


def test_a_chart_draws_gaps_and_single_points() -> None:
    html = chart("t", [1.0, 2.0, 3.0, 4.0], [Line("a", [1.0, None, 3.0, 2.0], "c0")])
    path = re.findall(r'class="line c0" d="([^"]*)"', html)
    assert path == ["M250 100h1M750 0L1000 50"]


def test_text_is_one_element() -> None:
    assert text('a"b<c>') == "<bdi>a&quot;b&lt;c&gt;</bdi>"


def test_a_batch_that_tells_nothing_changes_no_value() -> None:
    """One of late faults alone; but an interval is of one champion, and goes with it."""
    known = told(60)
    before = points_of(known.kept)[-1]
    (outcome, usage), *_ = outcomes(61, part=range(61, 62))
    empty = replace(outcome.metrics, windows=0, records=0, candidates=dict.fromkeys(NAMES, CandidateMetrics()))
    known.add(replace(outcome, metrics=empty, events=()), usage, SPENT)
    after = points_of(known.kept)[-1]
    for name in NAMES:
        seconds = before.candidates[name].seconds + usage.seconds[name]
        assert after.candidates[name] == before.candidates[name].model_copy(update={"seconds": seconds})
    other = replace(empty, batch=62, champion="frozen")
    known.add(replace(outcome, metrics=other, events=()), usage, SPENT)
    assert {each.difference for each in points_of(known.kept)[-1].candidates.values()} == {None}


def test_a_score_has_no_room_above_one() -> None:
    html = chart("t", [2.0, 4.0], [Line("a", [1.0, 1.0], "c0")], most=1.0)
    assert 'top:0%">1</span>' in html
    assert "1.5" not in html
    assert 'd="M500 0L1000 0"' in html
    narrow = chart("t", [2.0, 4.0], [Line("a", [97.0, 97.5], "c0")], unit=" %", most=100.0, least_range=10.0)
    assert 'top:0%">100 %</span>' in narrow
    assert "95 %" in narrow


def test_counts_have_whole_numbers_at_their_axis() -> None:
    for ys in ([0.0, 0.0], [0.0, 1.0], [1.0, 2.0], [3.0, 3.0]):
        labels = re.findall(r'%">([^<]*)</span>', chart("t", [2.0, 4.0], [Line("a", ys, "c0")], whole=True))
        assert len(labels) >= 2
        assert all(float(label).is_integer() and float(label) >= 0 for label in labels), labels
