"""The page of a stream: RUN_DIR/page.html, one file that needs no other and runs no script.

Text from outside (classes, ids, reasons, names) is escaped, and the page forbids scripts and every request by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from cluster.text import count, size
from jobs.streaming.charts import Line, Mark, Span, band, chart, number, style_of, text
from jobs.streaming.history import SWITCHES, Kept, points_of
from jobs.streaming.totals import Point, accuracies, novelties, windowed
from simmatch.config import Frozen, NonNegativeFloat, PositiveInt

FILE = "page.html"
CLOCK_S = 1e8
"""Times of records from here on are seconds since 1970; smaller ones are shown as numbers."""

SHOWN = 60
"""Latest events in the table."""

REFRESH_S = 30


class PageConfig(Frozen):
    """The page RUN_DIR/page.html, and the history that it and the report show."""

    enabled: bool = True

    every_batches: PositiveInt = 20
    """Between two versions of the page. Where writing takes long, fewer: at most a twentieth of the time."""

    window: PositiveInt = 500
    """Answers whose label is known, over which the score is shown beside that of all."""


class ReportConfig(Frozen):
    """Prices of the report, see `jobs.streaming.report`."""

    price_cpu_hour: NonNegativeFloat = 0.04
    """Of one processor for one hour."""

    price_gb_month: NonNegativeFloat = 0.02
    """Of a gigabyte (10⁹ bytes) on a disk for one month."""

    price_label: Annotated[str, Field(max_length=20)] = "USD"
    """The currency."""


STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#5c6670;--rule:#d8dee4;--card:#f6f8fa;
--c0:#0072b2;--c1:#c14a00;--c2:#00805c;--c3:#a8558a;--c4:#2a8fc9;--c5:#b27600;--c6:#444;
--drift:#d1242f;--switch:#8250df;--novelty:#bf8700;--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--back:#0d1117;--text:#e6edf3;--soft:#9aa5b1;--rule:#2c343d;--card:#161b22;
--c0:#58a6ff;--c1:#ff8a4c;--c2:#3fd29f;--c3:#e39ac8;--c4:#8fd3ff;--c5:#f0b53a;--c6:#c9d1d9;
--drift:#ff7b72;--switch:#c297ff;--novelty:#e3b341;--good:#56d364}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem;background:var(--back);color:var(--text);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1,p,.tiles b,.state,figcaption,td:last-child{overflow-wrap:anywhere}
h1{font-size:1.35rem;margin:0 .6rem 0 0;display:inline}h2{font-size:1.05rem;margin:1.6rem 0 .5rem}
.state{border:1px solid currentColor;border-radius:1rem;padding:.05rem .6rem;font-size:.85rem;color:var(--soft)}
.state.running{color:var(--good)}.state.failed{color:var(--drift)}
p{margin:.4rem 0;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.5rem .7rem}
.tiles b{display:block;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.8rem}
figure{margin:1.1rem 0}figcaption{font-weight:600;font-size:.9rem;margin-bottom:.35rem}
figcaption>span{font-weight:400;color:var(--soft)}
.key{margin-left:.8rem;color:var(--k);display:inline-block}.key::before{content:"";display:inline-block;width:1rem;
border-top:3px solid var(--k);vertical-align:middle;margin-right:.3rem}
.plot{position:relative;height:10.5rem;margin-left:3.6rem}.plot.low{height:1.6rem}
.plot svg{width:100%;height:100%;display:block;overflow:visible}
.ys span{position:absolute;right:100%;margin-right:.45rem;transform:translateY(-50%);white-space:nowrap}
.ys span,.xs{color:var(--soft);font-size:.75rem;font-variant-numeric:tabular-nums}
.xs{display:flex;justify-content:space-between;margin:.2rem 0 0 3.6rem}
path{vector-effect:non-scaling-stroke;fill:none;stroke-width:1.7;stroke-linejoin:round}
.grid{stroke:var(--rule);stroke-width:1}.line{stroke:var(--k)}.area{fill:var(--k);opacity:.75}
.thin{stroke-width:1}.dashed{stroke-dasharray:5 4}.dotted{stroke-dasharray:2 3}
.drift{stroke:var(--drift);stroke-width:1;--k:var(--drift)}.switch{stroke:var(--switch);stroke-width:1.5;
stroke-dasharray:4 3;--k:var(--switch)}.novelty{--k:var(--novelty)}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}.c5{--k:var(--c5)}
.c6{--k:var(--c6)}.soft{--k:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.87rem}
th,td{text-align:left;padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:nowrap}td:last-child{min-width:11rem}td.n{white-space:nowrap;min-width:0;text-align:right;font-variant-numeric:tabular-nums}
th.n{text-align:right}
@media(max-width:34rem){body{padding:.7rem}.plot{height:8.5rem}.hide{display:none}}
"""


def render(kept: Kept, config: PageConfig) -> str:
    """The page of a history as HTML."""
    points = points_of(kept)
    state = kept.state.partition(":")[0].strip()
    name, shown = text(kept.name), "running" if state == "running" else "failed" if state == "failed" else "other"
    body = (
        f'<h1>{name}</h1><span class="state {shown}">{text(kept.state or "not begun")}</span>'
        + f"<p>{_sentence(kept)}</p>"
        + _tiles(kept, points, config)
        + _charts(kept, points, config)
        + _candidates(points, config)
        + _events(kept)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(kept.name).removeprefix('<bdi>').removesuffix('</bdi>')}</title>"
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def moment(time: float) -> str:
    """The time of a record, for people.

    >>> moment(0.25), moment(1_700_000_000)
    ('0.25', '2023-11-14 22:13:20 UTC')
    """
    if not CLOCK_S <= time < 1e11:
        return f"{time:g}"
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def records_per_second(points: Sequence[Point]) -> list[float | None]:
    """At every point, over at least one second where so much has passed."""
    return windowed([(point.records, point.elapsed_s) for point in points], least=1.0)


def _sentence(kept: Kept) -> str:
    latest = kept.latest
    if latest is None:
        return "No batch yet."
    return (
        f"{count(latest.records, 'record')} in {latest.batch:,} batches; "
        f"time of the newest record: {moment(latest.time)}; page written {moment(kept.written)}."
    )


def _tiles(kept: Kept, points: Sequence[Point], config: PageConfig) -> str:
    if not points:
        return ""
    latest = points[-1]
    scores = windowed([(point.right, point.answered) for point in points], config.window)
    rate = next((value for value in reversed(records_per_second(points)) if value is not None), None)
    lag = next((point.lag_s for point in reversed(points) if point.lag_s is not None), None)
    champion = latest.candidates.get(latest.champion)
    drifts, bursts = kept.counts.get("drift", 0), kept.counts.get("novelty", 0)
    tiles = [
        ("accuracy of all answers", _percent(latest.right, latest.answered)),
        (f"of the latest {config.window}", "–" if scores[-1] is None else f"{100 * scores[-1]:.1f} %"),
        ("labels came", f"{latest.came:,}"),
        ("windows learnt with a label", f"{latest.labels:,}"),
        ("of all windows", _percent(latest.labels, latest.windows)),
        ("champion", text(latest.champion or "–")),
        ("drifts", f"{drifts:,}"),
        ("novelty bursts", f"{bursts:,}"),
        ("windows above threshold", f"{champion.novel if champion else 0:,}"),
        ("set aside", f"{latest.faults:,}"),
        ("duplicates", f"{latest.duplicates:,}"),
        ("classes", f"{latest.classes:,}"),
        ("records/s", "–" if rate is None else number(rate)),
        ("lag", "–" if lag is None else f"{number(lag)} s"),
        ("journal", size(latest.journal_bytes)),
    ]
    return '<div class="tiles">' + "".join(f"<div><b>{b}</b><span>{a}</span></div>" for a, b in tiles) + "</div>"


def _charts(kept: Kept, points: Sequence[Point], config: PageConfig) -> str:
    xs = [float(point.records) for point in points]
    names = list(dict.fromkeys(name for point in points for name in point.candidates))
    marks = [*_drifts(points), *(Mark(s.number, "switch") for s in kept.switches[1:])]
    scores = [
        Line(name, _in_percent(accuracies(points, name, config.window)), style_of(index))
        for index, name in enumerate(names)
    ]
    total = windowed([(point.right, point.answered) for point in points], math.inf)
    scores.append(Line("all answers", _in_percent(total), "soft thin dashed"))
    keys = '<span class="key drift">drift</span><span class="key switch">switch</span>'
    novelty = [
        Line("mean score", _of_champion(points, {name: novelties(points, name) for name in names}), "novelty"),
        Line("threshold", [_threshold(point) for point in points], "soft thin dashed"),
    ]
    title = f"Prequential accuracy, latest {config.window} labelled answers{keys}"
    labels = [Line("windows learnt with a label", [float(point.labels) for point in points], "c0")]
    labels.append(Line("of these late", [float(point.late) for point in points], "c1 thin"))
    labels.append(Line("labels came", [float(point.came) for point in points], "soft thin dashed"))
    return "".join(
        [
            chart(title, xs, scores, marks, unit=" %", most=100.0, least_range=10.0),
            band("Champion", xs[-1] if xs else 0, _spans(kept, points, names)),
            chart(f"Novelty, champion{keys}", xs, novelty, marks),
            chart("Labels", xs, labels, whole=True),
            chart("Records per second", xs, [Line("", records_per_second(points), "c2")]),
            chart("Lag", xs, [Line("", [point.lag_s for point in points], "c3")], unit=" s"),
            chart("Set aside", xs, [Line("", [float(point.faults) for point in points], "c5")], whole=True),
            "<p>Every chart over the number of records.</p>" if xs else "",
        ]
    )


def _in_percent(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def _drifts(points: Sequence[Point]) -> Iterable[Mark]:
    """Where the champion has found one since the point before."""
    before: dict[str, int] = {}
    for point in points:
        candidate = point.candidates.get(point.champion)
        if candidate is not None and candidate.drifts > before.get(point.champion, 0):
            yield Mark(point.records, "drift")
        before = {name: each.drifts for name, each in point.candidates.items()}


def _spans(kept: Kept, points: Sequence[Point], names: Sequence[str]) -> list[Span]:
    ends = [*(float(switch.number) for switch in kept.switches[1:]), float(points[-1].records) if points else 0.0]
    known = float(kept.switches[0].number) if len(kept.switches) == SWITCHES else 0.0  # earlier ones are forgotten
    starts = [known, *ends[:-1]]
    styles = {name: style_of(index) for index, name in enumerate(names)}
    return [
        Span(start, end, switch.champion, styles.get(switch.champion, "soft"))
        for switch, start, end in zip(kept.switches, starts, ends, strict=False)
    ]


def _of_champion(points: Sequence[Point], values: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    return [values[point.champion][i] if point.champion in values else None for i, point in enumerate(points)]


def _threshold(point: Point) -> float | None:
    return point.of(point.champion).threshold


def _candidates(points: Sequence[Point], config: PageConfig) -> str:
    if not points:
        return ""
    latest, rows = points[-1], []
    for name, each in latest.candidates.items():
        recent = accuracies(points, name, config.window)[-1]
        low, mean, high = each.difference or (None, None, None)
        rows.append(
            [
                text(name) + (" (champion)" if name == latest.champion else ""),
                _percent(each.right, each.answered),
                "–" if recent is None else f"{100 * recent:.1f} %",
                "–" if low is None or mean is None or high is None else _interval(low, mean, high),
                f"{each.drifts:,}",
                number(1e6 * each.seconds / latest.records) if latest.records else "–",
                size(each.state_bytes),
            ]
        )
    headings = ("candidate", "score", "latest", "less the champion's", "drifts", "µs a record", "state")
    return "<h2>Candidates</h2>" + _table(headings, rows, numbers=range(1, 7))


def _events(kept: Kept) -> str:
    if not kept.events:
        return "<h2>Events</h2><p>None.</p>"
    rows = [
        [f"{event.number:,}", text(moment(event.time)), text(event.kind), text(event.candidate), text(event.text)]
        for event in reversed(kept.events[-SHOWN:])
    ]
    total = sum(kept.counts.values())
    title = f"Events: the latest {len(rows)} of {total:,}" if total > len(rows) else "Events"
    return f"<h2>{title}</h2>" + _table(("record", "its time", "kind", "candidate", ""), rows, numbers=(0,))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Cells are HTML."""
    right = set(numbers)

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if index in right else "" for index in range(len(cells)))
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)) + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(headings, "th")}</thead><tbody>{body}</tbody></table></div>'


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _interval(low: float, mean: float, high: float) -> str:
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) points"
