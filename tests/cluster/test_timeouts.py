"""Calls with a time limit, and the check on the head of a cluster."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from cluster.network import RayHead, accepts_connections
from cluster.timeouts import run_with_timeout


def test_a_call_within_its_limit_gives_its_result() -> None:
    assert run_with_timeout(10.0, "add", lambda: 1 + 1) == 2
    assert run_with_timeout(10.0, "nothing", lambda: None) is None


def test_what_a_call_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_with_timeout(10.0, "divide", lambda: 1 / 0)


def test_a_call_without_an_end_is_named_at_its_limit() -> None:
    ended = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^report its resources: no answer within 0\.2 s$"):
        run_with_timeout(0.2, "report its resources", lambda: ended.wait(30))
    assert 0.2 <= time.monotonic() - began < 5.0
    ended.set()


def test_a_head_is_lost_once_it_has_been_silent_for_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayHead, "ASK_EVERY_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        head = RayHead(f"127.0.0.1:{listener.getsockname()[1]}", limit_s=0.5)
        for _ in range(20):
            assert not head.lost
            time.sleep(0.05)
    closed = time.monotonic()
    while not head.lost:
        assert time.monotonic() - closed < 10.0
        time.sleep(0.02)
    assert time.monotonic() - closed > 0.4
    assert head.silent_s() > 0.5


def test_a_head_that_comes_back_in_time_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayHead, "ASK_EVERY_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    head = RayHead(f"127.0.0.1:{port}", limit_s=30.0)
    deadline = time.monotonic() + 10.0
    while head.silent_s() == 0.0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert 0.0 < head.silent_s() < 30.0
    with socket.create_server(("127.0.0.1", port)):
        assert head.silent_s() == 0.0


def test_a_connection_is_refused_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert accepts_connections(address, 1.0)
    assert not accepts_connections(address, 1.0)
    assert not accepts_connections("no-such-host.invalid:1", 1.0)
