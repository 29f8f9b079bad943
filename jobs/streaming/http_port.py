"""A small HTTP server for answers: JSON in and out, a token for every request, and limits on all that a client may use.

* Who has no token learns nothing: every path and method is refused with 401, and the connection ends. Tokens are
  compared in constant time.
* A connection has `request_s` seconds for each request, from its first byte or the end of the answer before it, to the
  end of its own answer, however slowly bytes come: then it is cut. At most `connections` are open at a time.
* A body has at most `body_bytes`, and a length. Work on requests takes at most `share` of one processor: what is above
  is told to come later (429).
* Paths are looked up in dictionaries. No file is read or written.
* An answer says how many milliseconds of processor time it took (header `Server-Timing`).
"""

from __future__ import annotations

import hmac
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import numpy as np
from pydantic import Field

from simmatch.config import ConfigError, Frozen, PositiveFloat, PositiveInt
from simmatch.documents import DocumentError, load_json

LOOK_S = 0.2
"""Between two looks for connections that have taken too long."""

KEPT_LATENCIES = 10_000
BURST_S = 2.0
"""Seconds of work that requests may take before `share` limits them."""


class HttpConfig(Frozen):
    """A port that answers requests: GET /state, GET /answers/ID, POST /score."""

    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """0: a free one; RUN_DIR/answers.json says which."""

    host: str = "127.0.0.1"
    """Address to listen at. On any other than a loopback address the token and the answers travel unencrypted: put a
    proxy with TLS before it."""

    token_env: str = "SIMMATCH_ANSWERS_TOKEN"
    """Environment variable that holds the token, at least 16 characters; requests carry `Authorization: Bearer
    TOKEN`."""

    body_bytes: PositiveInt = 2**20
    request_s: PositiveFloat = 10.0
    connections: PositiveInt = 16

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of one processor's time, that work on requests may take in the long run."""

    windows: PositiveInt = 64
    """Most windows of one request."""


class Refused(Exception):
    """A request that cannot be answered: a status, and one line."""

    def __init__(self, status: HTTPStatus, reason: str, *, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.after_s = status, after_s


Route = Callable[[str, Any], Any]
"""(rest of the path, body of a POST) → what is sent as JSON."""


class Share:
    """Limits work to a share of the time, with some seconds of credit at most.

    >>> share = Share(0.5, burst_s=1.0, clock=iter([0.0, 0.0, 1.0]).__next__)
    >>> share.spend(2.0), share.wait_s(), share.wait_s()  # 1 s is owed; half a second is earned in the next one
    (None, 2.0, 1.0)
    """

    def __init__(self, share: float, burst_s: float = BURST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._most, self._clock = share, burst_s, clock
        self._credit, self._at = burst_s, clock()

    def spend(self, seconds: float) -> None:
        """So much work was done."""
        self._credit -= seconds

    def wait_s(self) -> float:
        """Seconds until there is credit again; 0 if there is."""
        now = self._clock()
        self._credit = min(self._most, self._credit + self._share * (now - self._at))
        self._at = now
        return max(0.0, -self._credit / self._share)


class HttpPort:
    """The server, in threads of its own.

    Parameters
    ----------
    config: its limits.
    routes: (method, first part of the path) → what answers; called by one thread at a time.
    token: of this server.

    Raises
    ------
    ConfigError
        The address cannot be used.
    """

    def __init__(self, config: HttpConfig, routes: Mapping[tuple[str, str], Route], token: str) -> None:
        self.config, self.routes, self._token = config, routes, token.encode()
        self.latencies_s: deque[float] = deque(maxlen=KEPT_LATENCIES)
        """Of the latest requests that were answered, from the end of the request to that of the answer."""
        self.answered = self.refused = 0
        self.work, self.share = threading.Lock(), Share(config.share)
        self.open: dict[socket.socket, float] = {}
        """Connections, and until when each is given time."""
        self.lock = threading.Lock()
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._server = type("_Listener", (_Listener,), {"address_family": family})((config.host, config.port), self)
        except (OSError, OverflowError) as error:
            place = f"{config.host}:{config.port}"
            raise ConfigError(f"answers.http: expected an address to listen at, got {place}: {error}") from None
        self.closing = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(LOOK_S / 4,), name="answers", daemon=True).start()
        threading.Thread(target=self._watch, name="answers-watch", daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{name}:{port}"

    def allowed(self, header: str | None) -> bool:
        """Whether a request carries the token."""
        given = (header or "").encode(errors="replace")
        return hmac.compare_digest(given, b"Bearer " + self._token)

    def percentiles_ms(self) -> dict[str, float]:
        """p50 and p99 of the latest requests, in milliseconds."""
        known = list(self.latencies_s)
        if not known:
            return {}
        return {f"p{part}_ms": round(1000 * float(np.percentile(known, part)), 3) for part in (50, 99)}

    def answer(self, method: str, path: str, body: Any) -> tuple[Any, float]:
        """What a route says, within the share of time, and the seconds of processor time that it took."""
        route, rest = self.find(method, path)
        if not self.work.acquire(timeout=self.config.request_s / 2):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "expected fewer requests at a time", after_s=1.0)
        try:
            wait_s = self.share.wait_s()
            if wait_s > 0:
                raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "expected fewer requests a second", after_s=wait_s)
            started = time.thread_time()
            try:
                content = route(rest, body)
            finally:
                seconds = time.thread_time() - started
                self.share.spend(seconds)
            return content, seconds
        finally:
            self.work.release()

    def find(self, method: str, path: str) -> tuple[Route, str]:
        """The route of a path, and the rest of the path."""
        head, _, rest = path.removeprefix("/").partition("/")
        route = self.routes.get((method, head))
        if route is None or not path.startswith("/"):
            known = ", ".join(f"{method} /{name}" for method, name in self.routes)
            status = HTTPStatus.NOT_FOUND
            if any(name == head for _, name in self.routes):
                status = HTTPStatus.METHOD_NOT_ALLOWED
            raise Refused(status, f"expected one of {known}")
        return route, rest

    def close(self) -> None:
        """Listen no more, and end all connections."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            _cut(self.open)

    def _watch(self) -> None:
        while not self.closing.wait(LOOK_S):
            with self.lock:
                _cut([link for link, until in self.open.items() if time.monotonic() > until])


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], port: HttpPort) -> None:
        self.port = port
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without looking up the host's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        port = self.port
        with port.lock:
            full = len(port.open) >= port.config.connections
            if not full:
                port.open[request] = time.monotonic() + port.config.request_s
        if full:
            port.refused += 1
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.port.lock:
            self.port.open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, or was cut, is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "simmatch", ""
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.port.config.request_s)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any method: who has no token learns nothing
            return self._serve
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        """Nothing: requests are counted."""

    def _serve(self) -> None:
        port, started = self.server.port, time.monotonic()
        try:
            if not port.allowed(self.headers.get("Authorization")):
                raise Refused(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Bearer TOKEN")
            path = urlsplit(self.path).path
            port.find(self.command, path)
            body = self._body() if self.command == "POST" else None
            started = time.monotonic()
            content, seconds = port.answer(self.command, path, body)
            self._send(HTTPStatus.OK, content, {"Server-Timing": f"work;dur={1000 * seconds:.3f}"})
            port.latencies_s.append(time.monotonic() - started)
            port.answered += 1
        except Refused as refusal:
            port.refused += 1
            # a body that was not read would be taken for the next request
            self.close_connection = True
            after_s = refusal.after_s
            later = {} if after_s is None else {"Retry-After": str(math.ceil(after_s))}
            self._send(refusal.status, {"error": str(refusal)}, later)
        with port.lock:
            if self.connection in port.open:
                port.open[self.connection] = time.monotonic() + port.config.request_s

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") is not None or not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected the header Content-Length")
        most = self.server.port.config.body_bytes
        if len(length) > 18 or int(length) > most:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of at most {most} bytes")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, f"expected a body of {length} bytes, got {len(raw)}")
        try:
            return load_json(raw)
        except DocumentError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _send(self, status: HTTPStatus, content: Any, headers: Mapping[str, str]) -> None:
        raw = json.dumps(content, ensure_ascii=False, allow_nan=False).encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _cut(links: Any) -> None:
    for link in list(links):
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


def last_part(rest: str) -> str:
    """The id in the rest of a path.

    >>> last_part("line%204%2F17")
    'line 4/17'
    """
    return unquote(rest)
