"""A whole cluster on one machine, from empty hosts to a served model (`infra/e2e.sh`), and who may reach its ports.

The script needs root and network namespaces; where it says that something is missing, its tests are skipped for that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from jobs.benchmarks.namespaces import NAMESPACES, NO_HOSTS
from tests.ports import Port, ask

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = r"198\.18\.0\.\d"


@cache
def run(*arguments: str) -> str:
    """What the script prints, in all processes that it starts; skips the test where this machine lacks something."""
    with subprocess.Popen(
        [ROOT / "infra/e2e.sh", *arguments], env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        out, err = process.communicate()
    assert list(NAMESPACES.glob(f"simmatch-{process.pid}-*")) == []
    if process.returncode == NO_HOSTS:
        pytest.skip(err.strip())
    assert process.returncode == 0, out + err
    return out


def rows(output: str) -> list[tuple[str, str, str]]:
    """Address, process and what happened, of every port."""
    found = re.findall(r"^ {10}(\S+):\d+ +(\S+) +(.*)$", output, re.MULTILINE)
    assert len(found) > 20
    return found


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_without_the_token_every_port_refuses() -> None:
    """Those that do not are known, are what they are expected to be, and are on no interface but their own."""
    found = rows(run("--short"))
    refusing = {process for _, process, what in found if what.startswith("refuses ")}
    assert refusing >= {
        "gcs_server", "raylet", "dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::JobSupervisor",
        "ray.util.client.server", "jobs.pretrain", "ray::Worker", "uvicorn",
    }  # fmt: skip
    for address, process, what in found:
        assert "OPEN" not in what
        assert "refuses" in what or {
            "no token: Prometheus": process in ("dashboard.py", "monitor.py", "ray::DashboardAgent"),
            "no token: torch's store and gloo": process == "ray::Worker" and re.fullmatch(ADDRESS, address),
            "no token: S3 server of the tests": process == "moto.server",
        }.get(what), (address, process, what)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_a_run_on_three_hosts_leaves_checkpoints_in_s3() -> None:
    assert re.search(r"^ *[\d.]+ s  checkpoints in S3$", run("--short"), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_from_empty_hosts_to_a_served_prediction() -> None:
    """A worker is drained and comes back in between; the script checks each step itself."""
    steps = [line.partition(" s  ")[2] for line in run().splitlines()]
    assert len(steps) == 22
    assert steps[-1] == "a served prediction"


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "infra/e2e.sh"], env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (NO_HOSTS, "")
    assert done.stderr == (
        f"error: expected {python} to have the packages of make test; PYTHON names another interpreter\n"
    )


# --- what the look at ports finds -----------------------------------------------------------------------------------


@contextmanager
def http_server(*, status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def rpc_server(*, lets_in: str) -> Iterator[int]:
    """It refuses all calls but one."""
    import grpc

    class Every(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
                if details.method != lets_in:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Every()])
        number = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield number
        server.stop(None).wait()


def asked(number: int) -> Port:
    port = Port("127.0.0.1", number, "test")
    ask(port)
    return port


def test_an_open_http_server_is_found() -> None:
    with http_server(status=401) as number:
        assert asked(number).let_in == []
    with http_server(status=404) as number:
        port = asked(number)
    assert port.refused == 0
    assert "GET /api/jobs/ 404" in port.let_in
    assert "OPEN: " in str(port)


def test_an_open_call_is_found() -> None:
    with rpc_server(lets_in="/ray.rpc.InternalKVGcsService/InternalKVPut") as number:
        port = asked(number)
    assert port.let_in == ["/ray.rpc.InternalKVGcsService/InternalKVPut OK"]
    assert port.refused > 100
    assert "OPEN: /ray.rpc.InternalKVGcsService/InternalKVPut OK" in str(port)
