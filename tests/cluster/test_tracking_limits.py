"""What tracking may cost: time while the server hangs, time at the end of a job, records when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import cluster.tracking.spool
import cluster.tracking.spool_writer
from cluster.tracking.config import TrackingConfig
from cluster.tracking.delivery import Delivery, SendProgress
from cluster.tracking.events import Event, MetricsEvent, StartEvent, TagsEvent, Unreadable
from cluster.tracking.sender import MOST_STALLED, Sender
from cluster.tracking.spool import Spool
from cluster.tracking.spool_writer import LOST_TAG
from cluster.tracking.tracker import Tracker
from tests.outages import Outage, Proxy, problems

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "objective", "residual", "num_iters", "active_fraction", "dead_channels", "images_per_second", "bytes_exchanged",
    "num_exchanges",
)  # fmt: skip
EVENTS_PER_S = 20
POLL_S = 0.5
SLACK_S = 1.5


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """The sender's thread imports MLflow, which takes longer than these tests."""
    import mlflow.store.tracking.rest_store  # noqa: F401


@contextmanager
def hanging() -> Iterator[str]:
    """A server that reads requests and never answers."""
    proxy = Proxy(0, Outage("hang"))
    yield proxy.uri
    proxy.close()


@contextmanager
def dripping() -> Iterator[str]:
    """A server whose answers never end: a byte now and then, before any time-out."""
    proxy = Proxy(0, Outage("drip", delay_s=0.3))
    yield proxy.uri
    proxy.close()


@contextmanager
def silent() -> Iterator[str]:
    """A port that does not even accept: the queue of its socket is full, so packets are dropped."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = server.getsockname()[1]
        for _ in range(8):
            link = stack.enter_context(socket.socket())
            link.setblocking(False)
            link.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"


@contextmanager
def nameless() -> Iterator[str]:
    """A name whose look-up does not end, which no time-out of a client covers."""
    known, over = socket.getaddrinfo, threading.Event()

    def look_up(host: Any, *arguments: Any, **named: Any) -> Any:
        if host == "mlflow.test":
            over.wait(60)
            raise socket.gaierror("no such host")
        return known(host, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        patch.setenv("NO_PROXY", "mlflow.test")
        yield "http://mlflow.test:5000"
        over.set()


SERVERS: dict[str, Callable[[], Any]] = {
    "hanging": hanging, "dripping": dripping, "silent": silent, "nameless": nameless
}  # fmt: skip


# --- time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["hanging", None])
def test_share_of_the_controllers_time(server: str | None, tmp_path: Path) -> None:
    """20 records a second, as the controller gets them: those since its last poll, in a row.

    The middle of several polls: another process may hold the processor within any one of them.
    """
    with ExitStack() as stack:
        uri = stack.enter_context(hanging()) if server else "http://127.0.0.1:1"
        config = TrackingConfig(enabled=server is not None, uri=uri, flush_s=0.0, timeout_s=1.0)
        tracker = Tracker(tmp_path / "run", config)
        tracker.start("run", layers=2)
        spent, started = [], time.monotonic()
        for poll in range(7):
            before = tracker.seconds
            for event in range(round(EVENTS_PER_S * POLL_S)):
                tracker.metrics(event, dict.fromkeys(NAMES, 1.0 / (1 + event)), layer=poll % 2)
            spent.append(tracker.seconds - before)
            time.sleep(POLL_S)
        wall_s = time.monotonic() - started
        assert 0 < sum(spent) <= tracker.seconds < wall_s
        assert statistics.median(spent) / POLL_S <= 0.001
        tracker.close()


def test_a_slow_disk_costs_the_controller_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    before, append = tracker.seconds, Spool.append
    monkeypatch.setattr(Spool, "append", lambda *arguments: (time.sleep(0.2), append(*arguments)))
    for step in range(3):
        tracker.metrics(step, {"objective": 1.0})
    assert 0 < tracker.seconds - before < 0.2
    tracker.close()
    events = [event for event, _ in Spool(tmp_path / "run" / "events.jsonl").read()]
    assert [step_of(event) for event in events] == [None, 0, 1, 2]


def step_of(event: Event | Unreadable) -> int | None:
    return event.step if isinstance(event, MetricsEvent) else None


class Stuck:
    """A folder that hangs, as one of a server that is gone does: an append comes back only once it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go, self.reached = threading.Event(), threading.Event()
        append = Spool.append

        def hang(spool: Spool, event: Event) -> None:
            self.reached.set()
            self.let_go.wait(60)
            append(spool, event)

        monkeypatch.setattr(Spool, "append", hang)


def test_a_folder_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limited number of events waits in memory; the failure is reported once; later events are in order."""
    monkeypatch.setattr(cluster.tracking.spool_writer, "KEPT_EVENTS", 10)
    monkeypatch.setattr(cluster.tracking.spool_writer, "REPORT_AFTER_S", 0.1)
    lines: list[str] = []
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False, timeout_s=0.2))
    tracker.start("run", layers=1)
    tracker.announce_to(lines.append)
    stuck = Stuck(monkeypatch)
    tracker.metrics(0, {"objective": 1.0})
    assert stuck.reached.wait(20)
    time.sleep(0.1)
    before = tracker.seconds
    for step in range(1, 31):
        tracker.metrics(step, {"objective": 1.0})
    assert tracker.seconds - before < 0.2
    assert tracker.lost == 20
    assert lines == [f"{tmp_path / 'run'} takes no records: it does not answer; the job continues and keeps at most 10"]
    started = time.monotonic()
    assert not tracker.flush(0.2)
    assert time.monotonic() - started < 5
    stuck.let_go.set()
    assert tracker.flush(20)
    tracker.close()
    events = [event for event, _ in Spool(tmp_path / "run" / "events.jsonl").read()]
    assert [step_of(event) for event in events] == [None, 0, *range(21, 31), None]
    assert isinstance(events[-1], TagsEvent)
    assert events[-1].values == {LOST_TAG: 20}
    assert lines[1:] == ["events.jsonl is written again, without 20 records"]


def test_a_folder_that_hangs_to_the_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False, timeout_s=0.2))
    tracker.start("run", layers=1)
    stuck = Stuck(monkeypatch)
    tracker.metrics(0, {"objective": 1.0})
    tracker.metrics(1, {"objective": 1.0})
    started = time.monotonic()
    tracker.finish("FINISHED")
    assert tracker.close() == 0
    assert time.monotonic() - started < 5
    assert tracker.lost == 3
    assert problems(tracker) == ["3 records lost: nothing was written within 0.2 s"]
    stuck.let_go.set()
    assert tracker._writer._thread is not None
    tracker._writer._thread.join(20)
    Spool(tmp_path / "run" / "events.jsonl").open().close()  # let go, though late


def test_nothing_is_sent_that_is_not_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure it would be recorded anew, with another time."""
    monkeypatch.setattr(Spool, "sync", lambda spool: 0)
    sink, tracker = StuckSink(stuck=0), Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    sender = Sender(Delivery(tracker._spool, tmp_path / "x", "here", safe_bytes=tracker._safe_bytes), sink.opened)
    sender.close(5.0)
    sender.run()
    assert (sink.got, sender.delivery.pending()) == ([], 1)
    monkeypatch.undo()
    tracker.flush(20)
    sender.run()
    assert (len(sink.got), sender.delivery.pending()) == (1, 0)
    tracker.close()


def test_what_another_machine_would_not_find_is_held(tmp_path: Path) -> None:
    """A run of an object store: its next machine finds what was brought there, and records the rest anew."""
    sink, tracker = StuckSink(stuck=0), Tracker(tmp_path / "run", TrackingConfig(enabled=False), held=True)
    tracker.start("run", layers=1)
    start_bytes = tracker._spool.size_bytes()
    tracker.metrics(1, {"objective": 1.0})
    tracker.flush(20)
    sender = Sender(Delivery(tracker._spool, tmp_path / "x", "here", safe_bytes=tracker._safe_bytes), sink.opened)
    for released, kinds in ((0, []), (start_bytes, ["start"]), (tracker._spool.size_bytes(), ["start", "metrics"])):
        tracker.release(released)
        sender.close(5.0)
        sender.run()
        assert [event.kind for event in sink.got] == kinds
        assert sender.delivery.pending() == 2 - len(kinds)
    tracker.close()


@pytest.mark.parametrize("name", SERVERS)
def test_the_end_is_bounded(name: str, tmp_path: Path) -> None:
    with SERVERS[name]() as uri:
        tracker = Tracker(tmp_path / "run", TrackingConfig(uri=uri, flush_s=0.5, timeout_s=1.0))
        tracker.start("run", layers=1)
        tracker.metrics(1, {"objective": 1.0})
        time.sleep(0.5)  # a request is under way
        tracker.finish("FINISHED")
        started = time.monotonic()
        assert tracker.close() == 3
        assert time.monotonic() - started < 0.5 + 1.0 + SLACK_S
        lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == ["start", "metrics", "finish"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dripping", pytest.param("hanging", marks=pytest.mark.fault)])
def test_the_process_ends_at_once(name: str, tmp_path: Path) -> None:
    """No thread that hangs holds it back."""
    code = (
        "import pathlib, sys, time\n"
        "from cluster.tracking.tracker import Tracker, TrackingConfig\n"
        "import mlflow.store.tracking.rest_store\n"
        "config = TrackingConfig(uri=sys.argv[2], flush_s=0.2, timeout_s=1.0)\n"
        "tracker = Tracker(pathlib.Path(sys.argv[1]), config)\n"
        "tracker.start('run', layers=1)\n"
        "time.sleep(0.5)\n"
        "print('left', tracker.close(), flush=True)\n"
    )
    with SERVERS[name]() as uri:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run"), uri],
            env=os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "left 1\n"
            closed = time.monotonic()
            assert process.wait(60) == 0
        assert time.monotonic() - closed < 20.0  # the server drips for hours


# --- a request that never ends -----------------------------------------------------------------------------------


class StuckSink:
    """Takes nothing until it is let go; the first so many attempts get stuck."""

    def __init__(self, stuck: int) -> None:
        self.stuck = stuck
        self.attempts = 0
        self.let_go = threading.Event()
        self.got: list[Event | Unreadable] = []

    def connect(self, start: Event | Unreadable, runs: dict[str, str]) -> dict[str, str]:
        return {"parent": "id"}

    def send(self, events: Any) -> None:
        self.attempts += 1
        if self.attempts <= self.stuck:
            self.let_go.wait(60)
        self.got += events

    @contextmanager
    def opened(self, alive: Callable[[], None]) -> Iterator[StuckSink]:
        yield self


def numbered(number: int) -> Event:
    """An event whose time is this number."""
    return StartEvent(
        time_ms=number, run_key="0", attempt=1, name="run", experiment="simmatch", layers=0, uri="here", tags={}
    )


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "events.jsonl").open()
    for number in range(3):
        spool.append(numbered(number))
    yield spool
    spool.close()


def test_a_request_that_never_ends_is_given_up(spool: Spool) -> None:
    sink = StuckSink(stuck=1)
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here"), sink.opened, stalled_s=0.2)
    sender.close(60.0)
    sender.run()
    assert (sender.delivery.pending(), sender.delivery.sent, sink.attempts) == (0, 3, 2)
    spool.append(numbered(3))
    progress = spool.path.with_suffix(".offset").read_bytes()
    sink.let_go.set()  # the first attempt wakes up, with its old batch
    [stuck] = sender._stalled
    stuck.join(30)
    assert len(sink.got) == 6
    assert (sender.delivery.sent, sender.delivery.pending()) == (3, 1)
    assert spool.path.with_suffix(".offset").read_bytes() == progress


def test_few_threads_hang_at_a_time(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tracking.sender.BACKOFF_FIRST_S", 0.01)
    sink = StuckSink(stuck=1000)
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here"), sink.opened, stalled_s=0.04)
    sender.close(2.0)
    sender.run()
    assert sink.attempts == MOST_STALLED
    assert sender.last_error == "TimeoutError: no whole answer within 0.04 s"
    assert sender.delivery.pending() == 3
    sink.let_go.set()


# --- the disk ----------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(path: Path, room_bytes: int = 10) -> Iterator[None]:
    """The system takes that many bytes more of a file, then none: the limit of the process stands for the disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def numbers(spool: Spool) -> list[int]:
    return [event.time_ms for event, _ in spool.read()]


def test_an_append_that_failed_leaves_nothing(spool: Spool) -> None:
    size = spool.size_bytes()
    with full_disk(spool.path):
        for _ in range(2):
            with pytest.raises(OSError, match=rf"\[Errno {errno.EFBIG}\]"):
                spool.append(numbered(3))
        assert spool.size_bytes() > size, "the system took nothing: the test shows nothing"
        assert numbers(spool) == [0, 1, 2]
    spool.append(numbered(4))
    assert numbers(spool) == [0, 1, 2, 4]
    assert spool.path.read_bytes().count(b"\n") == 4


def test_a_full_disk_costs_nothing_when_it_passes(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    tracker.metrics(0, {"objective": 0.0})
    assert tracker.flush(20)
    path = tmp_path / "run" / "events.jsonl"
    with full_disk(path):
        tracker.metrics(1, {"objective": 1.0})
        tracker.params({"seed": 1})
        assert not tracker.flush(20)
        assert [problem.partition(":")[0] for problem in problems(tracker)] == ["2 records in memory"]
    tracker.metrics(2, {"objective": 2.0})
    assert tracker.flush(20)
    assert (problems(tracker), tracker.lost) == ([], 0)
    tracker.finish("FINISHED")
    tracker.close()
    kinds = [(event.kind, step_of(event)) for event, _ in Spool(path).read()]
    assert kinds == [
        ("start", None), ("metrics", 0), ("metrics", 1), ("params", None), ("metrics", 2), ("finish", None),
    ]  # fmt: skip


def test_a_disk_full_for_long_costs_the_oldest_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.tracking.spool_writer, "KEPT_EVENTS", 10)
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    path = tmp_path / "run" / "events.jsonl"
    with full_disk(path):
        tracker.params({"seed": 1})
        for step in range(30):
            tracker.metrics(step, {"objective": 1.0})
        tracker.finish("FAILED")
    tracker.tags({"restarts": "1"})
    assert tracker.flush(20)
    assert tracker.lost == 23  # of 33 records 10 were kept
    assert problems(tracker)[0].startswith("23 records lost: ")
    tracker.close()
    events = [event for event, _ in Spool(path).read()]
    assert [event.step for event in events if isinstance(event, MetricsEvent)] == list(range(23, 30))
    assert [event.kind for event in events if event.kind != "metrics"] == [
        "start", "params", "finish", "tags", "tags"
    ]  # fmt: skip
    assert isinstance(events[-1], TagsEvent)
    assert events[-1].values == {LOST_TAG: 23}


def test_a_disk_full_to_the_end_is_reported(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    tracker.start("run", layers=1)
    with full_disk(tmp_path / "run" / "events.jsonl"):
        tracker.metrics(1, {"objective": 1.0})
        tracker.finish("FINISHED")
        tracker.close()
    assert tracker.lost == 2
    assert problems(tracker)[0].startswith("2 records lost")
    assert [event.kind for event, _ in Spool(tmp_path / "run" / "events.jsonl").read()] == ["start"]


def test_a_run_that_cannot_begin_its_record_does_not_begin(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(enabled=False))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()
    with full_disk(tmp_path / "run" / "events.jsonl"), pytest.raises(OSError, match="File too large"):
        tracker.start("run", layers=1)
    tracker.close()


def test_sending_goes_on_where_its_progress_cannot_be_kept(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SendProgress, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SendProgress, "save", full)
    sink = StuckSink(stuck=0)
    sender = Sender(Delivery(spool, spool.path.with_suffix(".offset"), "here"), sink.opened)
    sender.close(60.0)
    sender.run()
    assert [event.time_ms for event in sink.got] == [0, 1, 2]
    assert (sender.delivery.pending(), sender.delivery.notes) == (
        0,
        ["events.offset: [Errno 28] No space left on device"],
    )
