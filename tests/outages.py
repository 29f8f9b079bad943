"""Outages on purpose: a real MLflow server, and before it a proxy that fails as a plan says.

What reaches the server is its own business and real; what the client sees of it is the plan's.
"""

from __future__ import annotations

import http.client
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.tracking.tracker import Tracker

START_S = 110.0
LOOPBACK = "127.0.0.1"

Kind = Literal["refuse", "hang", "error", "slow", "lost reply", "late", "drip"]
"""
refuse      the connection is closed; the server hears nothing
hang        the request is read and never answered; the server hears nothing
error       an answer of `status` and no JSON, as of a gateway; the server hears nothing
slow        the server hears of it, and the client of the answer, after `delay_s`
lost reply  the server answers, then the connection is closed in place of the answer
late        the server hears of it after `delay_s`, when the client has given up
drip        the answer comes byte by byte, one each `delay_s`, and never ends; the server hears nothing
"""


@dataclass(frozen=True)
class Outage:
    """Requests that match fail, from the one numbered `first` on, `count` of them; None: all.

    Attributes
    ----------
    match: regular expression that is searched for in `METHOD /path`.
    """

    kind: Kind
    match: str = ""
    first: int = 0
    count: int | None = None
    delay_s: float = 1.0
    status: int = 500


class Proxy:
    """An HTTP server on loopback that passes requests on, or fails.

    Attributes
    ----------
    seen: `METHOD /path` of each request, in order of arrival.
    failed: the outage that each request met which met one.
    """

    def __init__(self, server_port: int, *plan: Outage, port: int = 0) -> None:
        self.seen: list[str] = []
        self.failed: list[Outage] = []
        self._server_port = server_port
        self._plan = list(plan)
        self._matched = [0] * len(plan)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._http = self._listen(port)
        self.port: int = self._http.server_address[1]

    @property
    def uri(self) -> str:
        """What a client of MLflow is to be told."""
        return f"http://{LOOPBACK}:{self.port}"

    def lift(self) -> None:
        """From here on nothing fails; what hangs goes on to hang."""
        with self._lock:
            self._plan, self._matched = [], []

    def close(self) -> None:
        """Give up the port, and every connection that hangs."""
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()

    def choose(self, request: str) -> Outage | None:
        """The outage that this request meets, if any."""
        with self._lock:
            self.seen.append(request)
            for index, outage in enumerate(self._plan):
                if re.search(outage.match, request):
                    number = self._matched[index]
                    self._matched[index] += 1
                    if number >= outage.first and (outage.count is None or number < outage.first + outage.count):
                        self.failed.append(outage)
                        return outage
        return None

    def wait(self, seconds: float | None = None) -> None:
        """Wait, but not longer than the proxy lives."""
        self._closed.wait(seconds)

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        """What the server answers."""
        link = http.client.HTTPConnection(LOOPBACK, self._server_port, timeout=60)
        try:
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            link.close()

    def _listen(self, port: int) -> http.server.ThreadingHTTPServer:
        handler = type("BoundHandler", (Handler,), {"proxy": self})
        server = QuietServer((LOOPBACK, port), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        return server


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what the tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    proxy: Proxy
    protocol_version = "HTTP/1.1"  # connections are kept, as by every real server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        outage = self.proxy.choose(f"{self.command} {self.path.partition('?')[0]}")
        kind = outage.kind if outage else None
        delay_s = outage.delay_s if outage else 0.0
        if kind in ("slow", "late"):
            self.proxy.wait(delay_s)
        if kind == "hang":
            self.proxy.wait()
        elif outage is not None and kind == "error":
            self._answer(outage.status, [], b"a planned failure")
            return
        elif kind == "drip":
            self._drip(delay_s)
        elif kind != "refuse":
            answer = self.proxy.forward(self.command, self.path, dict(self.headers), body)
            if kind not in ("lost reply", "late"):
                self._answer(*answer)
                return
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _answer(self, status: int, headers: list[Any], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, delay_s: float) -> None:
        with suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Endless: " + b"x" * 60_000:
                self.connection.sendall(bytes([byte]))
                self.proxy.wait(delay_s)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def mlflow_server(folder: Path, *options: str, **environment: str) -> Iterator[int]:
    """`mlflow server` on loopback with a SQLite store in `folder`, and more options and variables; its port."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "kept")]
    command += [option.format(port=port) for option in options]
    dropped = ("MLFLOW_TRACKING_URI", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | environment
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 9)  # its own session: nobody else's processes
        server.wait()


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{LOOPBACK}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def problems(tracker: Tracker) -> list[str]:
    """Rejected events, faults of the disk, and why the latest attempt failed."""
    sender, writer = tracker._sender, tracker._writer
    lines = list(sender.delivery.notes)
    if tracker.lost:
        lines.append(f"{tracker.lost} records lost: {writer.error}")
    elif writer.error is not None:
        lines.append(f"{writer.waiting} records in memory: {writer.error}")
    return [*lines, *([sender.last_error] if sender.last_error else [])]
