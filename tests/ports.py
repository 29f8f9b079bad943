"""Every port that is listened on, and what each does with a stranger: `python -m tests.ports`.

A line per port of this host: address (`*`: every interface), process, what happened. Exit status 1 where a stranger is
let in whom `KNOWN` does not name. Messages are empty, but a server that accepts them may do as it is told: for hosts of
your own, such as those of `infra/e2e.sh`.
"""

from __future__ import annotations

import http.client
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import psutil

TIMEOUT_S = 60.0

REQUESTS = (
    ("GET", "/simmatch"), ("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("DELETE", "/api/jobs/1"), ("GET", "/nodes"),
    ("PUT", "/api/packages/gcs/a.zip"), ("GET", "/api/v0/actors"), ("POST", "/get_or_create_runtime_env"),
    ("GET", "/api/2.0/mlflow/experiments/search?max_results=1"), ("POST", "/api/2.0/mlflow/runs/create"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts"), ("POST", "/graphql"), ("GET", "/get-artifact?path=a"),
)  # fmt: skip
"""Of the dashboard and its agents, the agent of runtime environments, and MLflow."""

UNNAMED = ("/ray.rpc.ObjectManagerService/Push", "/ray.rpc.ObjectManagerService/Pull")
"""Calls of Ray's that its Python package does not describe."""

SYNC = "/ray.rpc.syncer.RaySyncer/StartSync"
"""Between nodes. Ray 2.60 ends its process at a call without the metadata `node_id`, before it looks at the token."""

GENERAL = (
    "/grpc.health.v1.Health/Check",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
"""Calls of gRPC itself."""

REFUSED_HTTP, REFUSED_RPC, NO_SUCH_RPC = (401, 403), ("UNAUTHENTICATED", "PERMISSION_DENIED"), "UNIMPLEMENTED"

KNOWN = {
    "metrics": "Prometheus",
    "grpc": "gRPC's own services",
    "ranks": "torch's store and gloo",
    "s3": "S3 server of the tests",
}
"""What has no authentication; infra/README.md says what that means."""


@dataclass
class Port:
    """One that is listened on.

    Attributes
    ----------
    refused: requests and calls that were refused for want of a token.
    let_in: those that were not; what is behind, a key of `KNOWN`, where that is known.
    """

    address: str
    number: int
    process: str
    refused: int = 0
    let_in: list[str] = field(default_factory=list)
    known: str = ""

    def __str__(self) -> str:
        where = f"{'*' if self.address in ('0.0.0.0', '::') else self.address}:{self.number}"
        parts = [f"refuses {self.refused} of {self.refused + len(self.let_in)}"] if self.refused else []
        if self.let_in or not self.refused:
            parts.append(f"no token: {KNOWN[self.known]}" if self.known else f"OPEN: {', '.join(self.let_in) or '?'}")
        return f"{where:24} {self.process:24} {'; '.join(parts)}"


def ports() -> list[Port]:
    """All of this host, asked."""
    found = [Port(*place, _process(pid)) for place, pid in _listening().items()]
    for port in found:
        ask(port)
    left = _listening()  # without those that were closed meanwhile
    return sorted((port for port in found if (port.address, port.number) in left), key=lambda port: port.number)


def _listening() -> dict[tuple[str, int], int | None]:
    """Address and port → process."""
    links = psutil.net_connections("tcp")
    return {(link.laddr.ip, link.laddr.port): link.pid for link in links if link.status == psutil.CONN_LISTEN}


def _process(pid: int | None) -> str:
    """A short name of it: the module or file that Python runs, or the program."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        words = process.cmdline()
        if words[0].startswith("ray::"):
            return words[0].strip()
        if process.name().startswith("python"):
            named = words[words.index("-m") + 1] if "-m" in words else next((w for w in words if w.endswith(".py")), "")
            return named.rpartition("/")[2] or process.name()
        return process.name()
    return "?"


def ask(port: Port) -> None:
    """Knock at it in every way, and note what came of it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(port.address, port.address.removeprefix("::ffff:"))
    answers = [_request(host, port.number, *request) for request in REQUESTS[:1]]
    if answers[0] is None:  # not HTTP/1
        _call_all(port, f"{host}:{port.number}")
        return
    answers += [_request(host, port.number, *request) for request in REQUESTS[1:]]
    for (method, path), answer in zip(REQUESTS, answers, strict=True):
        status, body = answer or (0, b"")
        if status in REFUSED_HTTP:
            port.refused += 1
        else:
            port.let_in.append(f"{method} {path} {status}")
        if body.startswith(b"# HELP "):
            port.known = "metrics"
    if port.process == "moto.server":
        port.known = "s3"


def _request(host: str, port: int, method: str, path: str) -> tuple[int, bytes] | None:
    """Status and the beginning of the answer; None where the answer is not of HTTP/1."""
    link = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        link.request(method, path)
        answer = link.getresponse()
        return answer.status, answer.read(100)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        link.close()


def _call_all(port: Port, target: str) -> None:
    """Every call that there is; those that a server does not know do not count."""
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for name, streams in calls():
            status = _call(channel, name, streams)
            if status == "UNAVAILABLE":  # not gRPC either
                port.known = "ranks" if port.process.startswith("ray::") else ""
                port.let_in = ["not HTTP, not gRPC"]
                return
            if status in REFUSED_RPC:
                port.refused += 1
            elif status != NO_SUCH_RPC:
                port.let_in.append(f"{name} {status}")
    if port.let_in and all(call.partition(" ")[0] in GENERAL for call in port.let_in):
        port.known = "grpc"


def _call(channel: Any, name: str, streams: tuple[bool, bool]) -> str:
    """The name of the status that an empty message gets."""
    import grpc

    kind = {(False, False): "unary_unary", (False, True): "unary_stream"}.get(streams, "stream_stream")
    message: Any = b"" if not streams[0] else iter([b""])
    metadata = [("node_id", "0" * 56)] if name == SYNC else []
    try:
        answer = getattr(channel, kind)(name)(message, metadata=metadata, timeout=TIMEOUT_S)
        if streams[1]:
            next(iter(answer), None)
            answer.cancel()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@cache
def calls() -> tuple[tuple[str, tuple[bool, bool]], ...]:
    """Every remote call of Ray: its path, and whether request and reply are streams."""

    def of_ray() -> Iterator[tuple[str, tuple[bool, bool]]]:
        from ray.core import generated

        for module in pkgutil.walk_packages(generated.__path__, f"{generated.__name__}."):
            if module.name.endswith("_pb2"):
                for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                    for call in service.methods:
                        yield f"/{service.full_name}/{call.name}", (call.client_streaming, call.server_streaming)

    unary, both = (False, False), (True, True)
    return (*of_ray(), *((name, unary) for name in (*UNNAMED, *GENERAL[:2])), (GENERAL[2], both), (SYNC, both))


def main() -> int:
    found = ports()
    for port in found:
        print(port)
    return int(any(port.let_in and not port.known for port in found))


if __name__ == "__main__":
    sys.exit(main())
