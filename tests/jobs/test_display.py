"""Progress: plain lines are few and hold no control characters; bars keep their counts in a narrow terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import jobs.display
from cluster.messages import LayerMetrics, Progress
from cluster.text import count, size
from jobs.display import ProgressBars, RunDisplay, details, seconds_left, title, without_control

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


def plain() -> tuple[io.StringIO, RunDisplay]:
    out = io.StringIO()
    return out, RunDisplay(Console(file=out, width=40))


def drawn(bars: ProgressBars) -> list[str]:
    """The lines of the bars, as the terminal has them now."""
    console = bars.console
    lines = console.render_lines(bars._bars.get_renderable(), console.options)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


METRICS = LayerMetrics(
    layer=0,
    update=5,
    images=100,
    objective=0.5,
    residual=0.00999,
    num_iters=9,
    active_fraction=0.262,
    dead_channels=0,
    revived_channels=0,
    images_per_second=3517.0,
    window_s=1.0,
    waiting_share=0.1,
    checkpoint_share=0.0,
    bytes_exchanged=1.35e8,
    num_exchanges=10,
)


def learn(done: int, total: int = 29, *metrics: LayerMetrics) -> Progress:
    return Progress("learn", done, total, layer=0, metrics=metrics)


def encode(done: int, total: int = 9, images_per_second: float | None = None) -> Progress:
    return Progress("encode", done, total, layer=0, images_per_second=images_per_second)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_500_000, "3.5 MB"), (2.25e9, "2.25 GB"), (7e15, "7e+03 TB")],
)
def test_size(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_counts_have_a_singular_and_a_plural() -> None:
    assert [count(number, "rank") for number in (0, 1, 2, 10_000)] == ["0 ranks", "1 rank", "2 ranks", "10,000 ranks"]


def test_time_left_in_words() -> None:
    assert [seconds_left(seconds) for seconds in (0.4, 119, 121, 7200)] == [
        "0 s left", "119 s left", "2 min left", "2.0 h left",
    ]  # fmt: skip


def test_a_phase_in_words() -> None:
    assert title(learn(5)) == "layer 0 · learn"
    assert title(Progress("readout", 0, 1)) == "readout"
    assert details(learn(5, 29, METRICS)) == "3517 images/s · residual 1.0e-02 · active 26 % · 135 MB exchanged"
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
        display.progress(learn(29))  # the end is shown at once, and once
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


def test_a_phase_that_begins_again_is_timed_anew(clock: Clock) -> None:
    """After a restart from a checkpoint: 4 updates in 2 s, 4 to go."""
    out, display = plain()
    with display:
        display.progress(learn(20))
        for clock.now, done in ((200.0, 21), (202.0, 25)):
            display.progress(learn(done))
        display.progress(learn(0))
        clock.now += 6
        display.progress(learn(12))
    assert out.getvalue().splitlines()[-1] == "layer 0 · learn 12/29 · 8 s left"


def test_lines_only_where_they_are_asked_for(clock: Clock) -> None:
    out = io.StringIO()
    with ProgressBars(Console(file=out)) as bars:
        bars.update("encode", 0, 2)
        bars.update("encode", 2, 2)
        bars.remove("encode")
        bars.note("done")
    assert out.getvalue() == "done\n"


def test_a_terminal_gets_a_bar_per_phase(clock: Clock) -> None:
    out = io.StringIO()
    display = RunDisplay(Console(file=out, force_terminal=True, width=140))
    with display:
        display.note("mesh: [data 1] \x1b[2J")
        display.progress(encode(5, 29))
        clock.now += 2
        display.progress(encode(10, 29, images_per_second=352.0))
        [line] = drawn(display)
        assert re.fullmatch(r"layer 0 · encode .* 10/29 \d:\d\d:\d\d 8 s left · 352 images/s", line), line
        display.progress(learn(7))
        encoded, learnt = drawn(display)
        assert re.search(r"^layer 0 · encode .* 29/29 \d:\d\d:\d\d 352 images/s$", encoded)  # over, seen or not
        assert re.search(r"^layer 0 · learn .* 7/29 ", learnt)
    assert "[data 1]" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_counts_and_time_left_fit_every_terminal(width: int, clock: Clock) -> None:
    """Details that do not fit are left out whole, from the last; nothing is broken into two lines."""
    display = RunDisplay(Console(file=io.StringIO(), force_terminal=True, width=width))
    with display:
        display.progress(learn(100, 12000, METRICS))
        clock.now += 1
        display.progress(learn(1100, 12000, METRICS))
        [line] = drawn(display)
    assert len(line) <= width
    assert re.search(r" 1100/12000 \d:\d\d:\d\d 11 s left", line), line
    parts = ["11 s left", *details(learn(1, 29, METRICS)).split(" · ")]
    shown = line[line.index("11 s left") :].split(" · ")
    assert shown == parts[: len(shown)]
    assert len(shown) == {60: 1, 80: 2, 100: 3, 140: 5}[width]
