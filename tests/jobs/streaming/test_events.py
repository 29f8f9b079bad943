"""Events on their way: each at least once, in order, whatever the receiver does, and never in the way of learning."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.streaming import outbox
from jobs.streaming.events import INDEX_HEADER, SECRET_HEADER, Events, EventsConfig
from jobs.streaming.outbox import EventRefused, Message, Outbox, Waiting
from jobs.streaming.outcome import Event, Metrics, Outcome
from simmatch.config import ConfigError, parse
from tests.broker import Broker

SECRET = "a secret of the test, long"
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TEST_SECRET", SECRET)
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.1)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def message(index: int, kind: str = "drift") -> Message:
    return Message(
        stream="line 4", index=index, kind=kind, number=10 * index, time=1.5, text=f"event {index}", fields={}
    )


def batch(*indices: int, kind: Any = "drift") -> Outcome:
    events = tuple(Event(index, kind, 10 * index, 1.5, f"event {index}", {"before": 0.5}) for index in indices)
    return Outcome((), events, (), Metrics(1, 1, 0.0, 0, 0, 0, 0, 0, 0, 0, "main", {}))


@dataclass
class Receiver:
    """A webhook that answers as it is told, then with 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    silent: threading.Event = field(default_factory=threading.Event)

    @property
    def indices(self) -> list[int]:
        """Of events that were answered with 200."""
        return [body["index"] for status, _, body in self.got if status == 200]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            while told.silent.is_set():
                time.sleep(0.01)
            status = told.statuses.pop(0) if told.statuses else 200
            told.got.append((status, dict(self.headers), body))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", told.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield told
    told.silent.clear()
    server.shutdown()
    thread.join()
    server.server_close()


def config(receiver: Receiver, **options: Any) -> EventsConfig:
    values = {"url": f"{receiver.url}/hook", "secret_env": "STREAM_TEST_SECRET", "timeout_s": 1.0}
    return parse(EventsConfig, {"webhook": values | options})


def test_a_webhook_gets_every_event_once_and_in_order(receiver: Receiver, tmp_path: Path) -> None:
    """Failures of all kinds before, and redirects, which are not followed: the secret would go to another place."""
    receiver.statuses = [500, 302, 401, 200, 404, 429, 503]
    lines: list[str] = []
    events = Events("line 4", tmp_path, config(receiver), lines.append)
    events.add(batch(0, 1, 2))
    events.add(batch(1, 2, 3))  # applied again after a restart
    until(lambda: receiver.indices == [0, 1, 2, 3])
    events.close()
    _, headers, body = receiver.got[-1]
    assert headers[SECRET_HEADER] == SECRET
    assert headers[INDEX_HEADER] == "line 4-3"
    expected = {"stream": "line 4", "index": 3, "kind": "drift", "number": 30, "time": 1.5, "text": "event 3"}
    assert body == expected | {"fields": {"before": 0.5}}
    assert all(headers[INDEX_HEADER] == f"line 4-{body['index']}" for _, headers, body in receiver.got)
    assert len(receiver.got) == 4 + 6, "no redirect was followed, and no success repeated"
    assert lines[0].startswith("webhook takes no events: status 500;")
    assert len(lines) == 4, "told once, and once that it is over"
    assert not any(SECRET in line for line in lines)


def test_learning_never_waits(receiver: Receiver, tmp_path: Path) -> None:
    """A receiver that hangs: what waits is bounded, drifts outlast faults, and what is dropped is counted."""
    receiver.silent.set()
    events = Events("line 4", tmp_path, config(receiver, waiting=5, timeout_s=0.2), lambda _: None)
    started = time.thread_time()
    for index in range(0, 400, 2):
        events.add(batch(index, kind="fault"))
    events.add(batch(401, 403))
    for index in range(404, 600):
        events.add(batch(index, kind="fault"))
    assert time.thread_time() - started < 2.0
    assert events.outboxes[0].waiting == 5
    assert events.dropped() == {"webhook": 200 + 2 + 196 - 5}
    receiver.silent.clear()
    until(lambda: {401, 403} <= set(receiver.indices))
    assert receiver.indices == sorted(receiver.indices)
    events.close()


def test_what_is_refused_for_good_is_dropped(receiver: Receiver, tmp_path: Path) -> None:
    receiver.statuses = [422]
    lines: list[str] = []
    events = Events("line 4", tmp_path, config(receiver), lines.append)
    events.add(batch(0, 1))
    until(lambda: receiver.indices == [1])
    events.close()
    assert events.dropped() == {"webhook": 1}
    assert lines == ["webhook refuses event 0, which is dropped: status 422"]


def test_a_restart_sends_what_was_not_sent(receiver: Receiver, tmp_path: Path) -> None:
    """The first process is killed with events waiting; the second is told again of those since the snapshot."""
    receiver.silent.set()
    first = Events("line 4", tmp_path, config(receiver), lambda _: None)
    first.add(batch(0, 1, 2))
    first.sync()
    first.add(batch(3, 4))  # after the snapshot, so nowhere but in the journal
    for each in first.outboxes:
        with each._changed:  # the end of the process: its thread sends nothing more
            each._waiting.clear()
            each._closing = True
    receiver.silent.clear()
    second = Events("line 4", tmp_path, config(receiver), lambda _: None)
    second.add(batch(3, 4))
    until(lambda: receiver.indices[-1:] == [4])
    second.close()
    assert sorted(set(receiver.indices)) == [0, 1, 2, 3, 4]
    second.sync()
    third = Events("line 4", tmp_path, config(receiver), lambda _: None)
    third.add(batch(3, 4))  # known
    third.add(batch(5))
    until(lambda: receiver.indices[-1] == 5)
    third.close()
    assert receiver.indices.count(4) == 1
    assert receiver.indices.count(5) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"receivers": 3}', b'{"receivers": {"webhook": {"last": "x"}}}'])
def test_a_file_that_is_not_ours_is_left_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / outbox.FILE).write_bytes(content)
    assert outbox.load(tmp_path) == outbox.Kept()


def test_a_message_that_comes_back_is_the_same(tmp_path: Path) -> None:
    sent: list[Message] = []

    def never(_: Message) -> None:
        raise ConnectionError("away")

    away = Outbox("webhook", never, 10)
    away.start()
    away.put([message(index, "fault" if index % 2 else "drift") for index in range(20)])
    outbox.write(tmp_path, [away])
    away.close(0.0)
    back = Outbox("webhook", sent.append, 10)
    back.start(outbox.load(tmp_path).receivers["webhook"])
    until(lambda: len(sent) == 10)
    back.close()
    assert [each.index for each in sent] == list(range(0, 20, 2))
    assert sent == [message(index) for index in range(0, 20, 2)]
    assert back.kept() == Waiting(last=19, dropped=10)


def test_an_event_that_is_refused_holds_up_no_other() -> None:
    sent: list[int] = []

    def send(each: Message) -> None:
        if each.index % 3 == 0:
            raise EventRefused("not this one")
        sent.append(each.index)

    box = Outbox("webhook", send, 100)
    box.start()
    box.put(message(index) for index in range(30))
    box.close(LIMIT_S)
    assert sent == [index for index in range(30) if index % 3]
    assert box.dropped == 10


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"url": "file:///etc/passwd"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "ftp://host/x"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "http://"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "http://host:0/"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "http://host/a b"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "http://host/\r\nX: y"}, r"webhook\.url: .*expected http://HOST"),
        ({"url": "http://ada:pa55word@host/"}, r"webhook\.url: .*no credentials"),
        ({"url": "http://host/", "kinds": ["drifts"]}, r"webhook\.kinds"),
    ],
)
def test_addresses_that_are_none(values: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse(EventsConfig, {"webhook": values})
    assert "pa55word" not in str(caught.value)


def test_a_secret_is_needed(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAM_TEST_SECRET")
    with pytest.raises(ConfigError, match=r"^events\.webhook\.secret_env: .* got STREAM_TEST_SECRET, which is not set"):
        Events("line 4", tmp_path, config(receiver), print)


def test_only_the_kinds_that_were_asked_for(receiver: Receiver, tmp_path: Path) -> None:
    events = Events("line 4", tmp_path, config(receiver, kinds=["drift"]), print)
    events.add(batch(0, kind="fault"))
    events.add(batch(1))
    until(lambda: receiver.indices == [1])
    events.close()
    assert [body["kind"] for *_, body in receiver.got] == ["drift"]


def test_a_topic_gets_every_event_though_the_broker_goes_away(tmp_path: Path) -> None:
    """A real broker, stopped in between; the subscriber's session is kept, so nothing is missed."""
    mqtt = pytest.importorskip("paho.mqtt.client")
    from paho.mqtt.enums import CallbackAPIVersion

    indices: list[int] = []
    with Broker(tmp_path / "broker") as broker:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, "listener", clean_session=False)
        client.on_message = lambda *about: indices.append(json.loads(about[2].payload)["index"])
        client.on_connect = lambda *_: client.subscribe("plant/events", qos=1)
        client.reconnect_delay_set(1, 1)
        subscribed = threading.Event()
        client.on_subscribe = lambda *_: subscribed.set()
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        assert subscribed.wait(LIMIT_S)
        given = {"host": "127.0.0.1", "port": broker.port, "topic": "plant/events", "longest_pause_s": 1}
        events = Events("line 4", tmp_path, parse(EventsConfig, {"mqtt": given}), lambda _: None)
        events.add(batch(0, 1))
        until(lambda: indices == [0, 1])
        broker.end()
        events.add(batch(2, 3))
        time.sleep(0.2)
        broker.start()
        until(lambda: {2, 3} <= set(indices))
        events.close()
        client.loop_stop()
        client.disconnect()
    assert list(dict.fromkeys(indices)) == [0, 1, 2, 3]


@pytest.mark.parametrize("topic", ["", "plant/#", "plant/+/events", "plant\x00"])
def test_topics_that_are_none(topic: str) -> None:
    with pytest.raises(ConfigError, match=r"mqtt\.topic"):
        parse(EventsConfig, {"mqtt": {"host": "localhost", "topic": topic}})
