"""The port for answers: who is let in, and that no client can take more than its share of memory, threads or time."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.streaming.http_port import HttpConfig, HttpPort, Share
from jobs.streaming.tokens import token_from
from simmatch.config import ConfigError, parse
from tests import ports

TOKEN = "a token of the test, long"
LIMITS = HttpConfig(body_bytes=1000, request_s=1.0, connections=4, share=1.0)


def echo(rest: str, body: Any) -> Any:
    return {"rest": rest, "body": body}


@pytest.fixture(scope="module")
def port() -> Iterator[HttpPort]:
    opened = HttpPort(LIMITS, {("GET", "state"): echo, ("POST", "score"): echo}, TOKEN)
    yield opened
    opened.close()


def ask(
    port: HttpPort, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and content of the answer."""
    host, number = port.url.removeprefix("http://").split(":")
    link = http.client.HTTPConnection(host, int(number), timeout=10)
    try:
        link.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers)
        answer = link.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw else None
    finally:
        link.close()


def connect(port: HttpPort) -> socket.socket:
    host, number = port.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(number)), timeout=10)


def told(link: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    parts = []
    try:
        while part := link.recv(4096):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def test_answers_whom_it_knows(port: HttpPort) -> None:
    assert port.url.startswith("http://127.0.0.1:")
    assert ask(port, "GET", "/state/a/b?c=d") == (200, {"rest": "a/b", "body": None})
    assert ask(port, "POST", "/score", b'{"x": [1, "\xc3\xa9"]}') == (200, {"rest": "", "body": {"x": [1, "é"]}})


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "X"])
def test_a_stranger_learns_nothing(port: HttpPort, method: str) -> None:
    for path in ("/state", "/score", "/", "/none", "/../../etc/passwd"):
        for given in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"bearer {TOKEN}", TOKEN, "é"):
            headers = {} if given is None else {"Authorization": given}
            status, content = ask(port, method, path, headers=headers)
            assert status == 401
            assert content in (None, {"error": "expected the header Authorization: Bearer TOKEN"})


def test_the_ports_of_the_house_find_it_closed(port: HttpPort) -> None:
    host, number = port.url.removeprefix("http://").split(":")
    found = ports.Port(host, int(number), "python")
    ports.ask(found)
    assert found.let_in == []
    assert found.refused == len(ports.REQUESTS)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/none", None, 404),
        ("GET", "/..%2f..%2fetc/passwd", None, 404),
        ("GET", "/../../etc/passwd", None, 404),
        ("GET", "/score", None, 405),
        ("DELETE", "/state", None, 405),
        ("POST", "/score", b"", 400),
        ("POST", "/score", b"{", 400),
        ("POST", "/score", b"\xff\xfe", 400),
        ("POST", "/score", b"[" * 990, 400),
        ("POST", "/score", b" " * 1001, 413),
    ],
)
def test_requests_that_cannot_be_answered(
    port: HttpPort, method: str, path: str, body: bytes | None, status: int
) -> None:
    found, content = ask(port, method, path, body)
    assert found == status
    assert list(content) == ["error"]
    assert "Traceback" not in content["error"]
    assert ask(port, "GET", "/state")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Transfer-Encoding: chunked", b"411"),
        ("Content-Length: -1", b"411"),
        ("Content-Length: 1e3", b"411"),
        ("Content-Length: ٣", b"411"),
        ("Content-Length: 99999999999999999999999999", b"413"),
        ("", b"411"),
    ],
)
def test_lengths_that_are_none(port: HttpPort, headers: str, status: bytes) -> None:
    with connect(port) as link:
        link.sendall(f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\n".encode())
        assert told(link).split()[1] == status


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /state HTTP/1.1\r\n",
        f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n[1".encode(),
    ],
    ids=["nothing", "headers", "body"],
)
def test_a_client_that_takes_its_time_is_cut(port: HttpPort, sent: bytes) -> None:
    """Byte by byte, so that no time-out of the connection itself would ever end it."""
    started = time.monotonic()
    with connect(port) as link:
        link.sendall(sent)
        try:
            while time.monotonic() < started + 20:
                link.sendall(b"1")
                time.sleep(0.1)
        except OSError:
            pass
    assert time.monotonic() < started + 15, "the connection was never ended"
    deadline = time.monotonic() + 10
    while port.open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert port.open == {}


def test_so_many_connections_and_no_more(port: HttpPort) -> None:
    links = [connect(port) for _ in range(LIMITS.connections)]
    deadline = time.monotonic() + 10
    while len(port.open) < len(links) and time.monotonic() < deadline:
        time.sleep(0.01)
    with connect(port) as one_more:
        assert told(one_more) == b""
    for link in links:
        link.close()
    while port.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(port, "GET", "/state")[0] == 200


def test_a_connection_is_kept_for_the_next_request(port: HttpPort) -> None:
    host, number = port.url.removeprefix("http://").split(":")
    link = http.client.HTTPConnection(host, int(number), timeout=10)
    for _ in range(3):
        link.request("GET", "/state", headers={"Authorization": f"Bearer {TOKEN}"})
        answer = link.getresponse()
        assert (answer.status, json.loads(answer.read())["rest"]) == (200, "")
    assert len(port.open) == 1
    link.close()
    assert set(port.percentiles_ms()) == {"p50_ms", "p99_ms"}


def test_work_is_limited_to_its_share() -> None:
    now = [0.0]
    share = Share(0.25, burst_s=2.0, clock=lambda: now[0])
    done = 0.0
    while now[0] < 1000.0:
        if share.wait_s() > 0:
            now[0] += 0.5
        else:
            share.spend(0.3)
            done += 0.3
            now[0] += 0.3
    assert 250.0 - 2.0 <= done <= 250.0 + 3.0


def test_what_is_above_the_share_is_told_to_come_later() -> None:
    def work(_: str, __: Any) -> None:
        until = time.thread_time() + 0.06
        while time.thread_time() < until:
            pass

    port = HttpPort(HttpConfig(share=0.01, request_s=60.0), {("GET", "work"): work, ("GET", "state"): echo}, TOKEN)
    port.share = Share(0.01, burst_s=0.1)
    try:
        assert [ask(port, "GET", "/work")[0] for _ in range(3)] == [200, 200, 429]
        assert port.refused == 1
    finally:
        port.close()


def test_one_request_works_at_a_time() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work(_: str, __: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1

    port = HttpPort(HttpConfig(share=1.0), {("GET", "work"): work}, TOKEN)
    try:
        threads = [threading.Thread(target=ask, args=(port, "GET", "/work")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (most, port.answered) == (1, 8)
    finally:
        port.close()


def test_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    key, variable = "answers.http.token_env", "STREAM_TEST_TOKEN"
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=r"^answers\.http\.token_env: .* got STREAM_TEST_TOKEN, which is not set"):
        token_from(variable, key)
    for bad in ("", "short", "fifteen letters", "a token with a tab\t inside", "ein Schlüssel, lang genug"):
        monkeypatch.setenv(variable, bad)
        with pytest.raises(ConfigError, match=r"^answers\.http\.token_env: expected") as caught:
            token_from(variable, key)
        assert bad == "" or bad not in str(caught.value)
    monkeypatch.setenv(variable, f" {TOKEN}\n")
    assert token_from(variable, key) == TOKEN


def test_an_address_that_cannot_be_used(port: HttpPort) -> None:
    number = int(port.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"answers\.http: .* 127\.0\.0\.1:{number}: .*in use"):
        HttpPort(HttpConfig(port=number), {}, TOKEN)
    with pytest.raises(ConfigError, match=r"answers\.http: expected an address"):
        HttpPort(HttpConfig(host="no.such.host.invalid"), {}, TOKEN)
    with pytest.raises(ConfigError, match="port: expected"):
        parse(HttpConfig, {"port": 70000})
