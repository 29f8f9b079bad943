"""Plain lines hold no control characters, say how far a phase is, and are few."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import jobs.display
from cluster.messages import LayerMetrics, Progress
from jobs.display import PlainDisplay, TerminalDisplay, details, make_display, size, title, without_control

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Clock:
    """Stands in for the module `time`; moves when told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs.display, "time", clock)
    return clock


def plain() -> tuple[io.StringIO, PlainDisplay]:
    out = io.StringIO()
    display = make_display(Console(file=out, width=40))
    assert isinstance(display, PlainDisplay)
    return out, display


def learn(done: int, total: int = 29, metrics: LayerMetrics | None = None) -> Progress:
    return Progress("learn", done, total, layer=0, metrics=metrics)


def encode(done: int, total: int = 9, images_per_second: float | None = None) -> Progress:
    return Progress("encode", done, total, layer=0, images_per_second=images_per_second)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_500_000, "3.5 MB"), (2.25e9, "2.25 GB"), (7e15, "7e+03 TB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def test_a_phase_in_words() -> None:
    metrics = LayerMetrics(
        layer=0,
        update=5,
        images=100,
        objective=0.5,
        residual=0.00999,
        num_iters=9,
        active_fraction=0.262,
        dead_channels=0,
        revived_channels=0,
        images_per_second=351.7,
        window_s=1.0,
        waiting_share=0.1,
        checkpoint_share=0.0,
        bytes_exchanged=1.35e8,
        num_exchanges=10,
    )
    assert title(learn(5)) == "layer 0 · learn"
    assert title(Progress("readout", 0, 1)) == "readout"
    assert details(learn(5, metrics=metrics)) == "352 images/s · residual 1.0e-02 · active 26 % · 135 MB exchanged"
    assert details(learn(5)) == ""
    assert details(encode(5, images_per_second=351.7)) == "352 images/s"


def test_plain_lines(clock: Clock) -> None:
    out, display = plain()
    with display:
        display.note("ranks: 0 on host")
        display.progress(learn(5))
        clock.now += 1  # too soon for another line
        display.progress(learn(10))
        clock.now += 5
        display.progress(learn(17))
        display.progress(learn(29))  # the end is told at once, and once
        display.progress(learn(29))
        display.progress(Progress("readout", 1, 1))
    assert out.getvalue().splitlines() == [
        "ranks: 0 on host",
        "layer 0 · learn 5/29",
        "layer 0 · learn 17/29 · 6 s left",  # 12 updates in 6 s, 12 to go
        "layer 0 · learn 29/29",
        "readout 1/1",
    ]


def test_plain_lines_hold_no_control_characters() -> None:
    out, display = plain()
    long = "x" * 200
    with display:
        display.note("\x1b[36mrank 0 (pid 7)\x1b[0m was lost:\x07 [bold]why[/bold]\r\nTraceback\x9b1m\x1b]0;title\x07")
        display.note(long)
        display.progress(encode(9, images_per_second=1.0))
    text = out.getvalue()
    assert not CONTROL.search(text)
    assert text.splitlines()[0] == "rank 0 (pid 7) was lost: [bold]why[/bold]"
    assert long in text.splitlines()  # not folded: a log has no width


def test_control_characters_go_and_lines_stay() -> None:
    assert without_control("\x1b[1;31merror\x1b[0m\r\n\tat 3 × 3 · ‖y‖\x00") == "error\n\tat 3 × 3 · ‖y‖"


def test_a_terminal_gets_a_bar_per_phase() -> None:
    out = io.StringIO()
    display = make_display(Console(file=out, force_terminal=True, width=120))
    assert isinstance(display, TerminalDisplay)
    with display:
        display.note("mesh: [data 1] \x1b[2J")
        display.progress(learn(5))
        display.progress(encode(7, images_per_second=352.0))
        tasks = display._progress.tasks
        assert [(task.description, task.completed, task.total) for task in tasks] == [
            ("layer 0 · learn", 29, 29),  # an earlier phase is over, whether or not its end was seen
            ("layer 0 · encode", 7, 9),
        ]
        assert tasks[1].fields["details"] == "352 images/s"
    assert "[data 1]" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
