"""Answers over HTTP while a stream learns, and while it waits: what a client sees, and the processor time they take.

The client is a process of its own: it shares no interpreter with the stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.benchmarks.processes import Host, Member, RankGroup
from jobs.benchmarks.stream.served import Client, StreamProcess
from jobs.reporting import Report
from jobs.streaming.example import SAMPLES, records

PAUSE_S = 0.02
"""Of the client between two requests."""

MANY, EVERY = 64, 10
"""Windows of one request in ten; the others have one."""


@dataclass(frozen=True)
class Asked:
    """A request: whether the stream was learning, its windows, seconds that the client waited, and of processor."""

    learning: bool
    windows: int
    latency_s: float
    work_s: float


def ask(_: Member | None, url: str, token: str, windows: list[Any], last: int, count: int) -> tuple[float, list[Asked]]:
    """Ask for scores until the version of batch `last` answers, then `count` times more.

    Returns
    -------
    Seconds until then, and the requests.
    """
    client, found, begun, learnt_s = Client(url, token), list[Asked](), time.perf_counter(), 0.0
    waiting = 0
    while waiting < count:
        body = {"windows": windows[: MANY if len(found) % EVERY == EVERY - 1 else 1]}
        started = time.perf_counter()
        status, content = client.ask("POST", "/score", body)
        latency_s = time.perf_counter() - started
        if status == 200:
            found.append(Asked(not learnt_s, len(body["windows"]), latency_s, client.work_s))
            waiting += bool(learnt_s)
            if not learnt_s and content["batch"] >= last:
                learnt_s = time.perf_counter() - begun
        else:  # the connection ends
            client.close()
        time.sleep(PAUSE_S)
    client.close()
    return learnt_s, found


def asked(stream: StreamProcess, window: int, learnt: int, count: int, report: Report) -> None:
    """Ask while so many records are learnt, then `count` times more; rows, a table and a figure.

    window: samples of what is scored.
    """
    values = np.array([record["values"] for record in records(MANY * window // SAMPLES)])
    windows, batch = values.reshape(MANY, window, 1).tolist(), stream.config.batch_size
    with RankGroup([Host()], threads=1) as client:
        client.ask(ask, stream.url, stream.token, windows, 0, 1)  # imports
        stream.append(learnt)
        last = stream.appended // batch
        [(seconds, found)] = client.ask(ask, stream.url, stream.token, windows, last, count)
    report.row(kind="learning while asked", records_per_second=learnt / seconds, pause_ms=1000 * PAUSE_S)
    rows = [_row(found, learning, windows) for learning in (True, False) for windows in (1, MANY)]
    for row in rows:
        report.row(kind="answers", **row)
    headings = {"stream": "the stream", "windows": "windows", "requests": "requests",
                "work_p50_ms": "ms of processor, p50", "work_p99_ms": "p99",
                "latency_p50_ms": "ms until the answer, p50", "latency_p99_ms": "p99"}  # fmt: skip
    title = f"answers, {1000 * PAUSE_S:g} ms between two requests, {learnt / seconds:,.0f} records / s meanwhile"
    report.rows_table(title, headings, rows)
    _draw(found, report)


def _some(found: Sequence[Asked], learning: bool, windows: int) -> list[Asked]:
    return [each for each in found if (each.learning, each.windows) == (learning, windows)]


def _row(found: Sequence[Asked], learning: bool, windows: int) -> dict[str, Any]:
    own = _some(found, learning, windows)
    row: dict[str, Any] = {"stream": "learns" if learning else "waits", "windows": windows, "requests": len(own)}
    for name in ("work", "latency") if own else ():
        ms = [1000 * getattr(each, f"{name}_s") for each in own]
        row |= {f"{name}_p{part}_ms": float(np.percentile(ms, part)) for part in (50, 99)}
    return row


def _draw(found: Sequence[Asked], report: Report) -> None:
    with report.figure("service-answers") as figure:
        axes = figure.subplots()
        for learning, name in ((True, "learns"), (False, "waits")):
            for windows, dashes in ((1, "-"), (MANY, ":")):
                ms = sorted(1000 * each.latency_s for each in _some(found, learning, windows))
                shares = np.arange(1, len(ms) + 1) / max(1, len(ms))
                axes.plot(ms, shares, f"C{int(learning)}{dashes}", label=f"the stream {name}, windows: {windows}")
        axes.set_xscale("log")
        axes.set_xlabel("ms until the answer")
        axes.set_ylabel("share of the requests")
        axes.legend(fontsize=8)
