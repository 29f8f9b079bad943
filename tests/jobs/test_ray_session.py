"""Which cluster a job joins, and as whom: what is refused before Ray is there, and the mode that is found."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2

from cluster.controller import RunFailed
from jobs import ray_session, working_dir
from simmatch.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]

TOKEN = "0123456789abcdef" * 4


class Service(grpc.GenericRpcHandler):
    """A control service that answers every question of who has its token; None: of everybody.

    reply: the answer.
    """

    def __init__(self, token: str | None, reply: bytes = b"") -> None:
        self._token, self._reply = token, reply

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            if self._token and ("authorization", f"Bearer {self._token}") not in details.invocation_metadata:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return self._reply

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Its address."""
    server = grpc.server(ThreadPoolExecutor(1), [service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(10)


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[str]:
    """Its address; the parameter is its token."""
    with serving(Service(request.param)) as address:
        yield address


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def start(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As a job does, but that Ray is not to come to be."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray_session.start_ray(1, 5.0)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8265",
        "ray://head:10001",
        "head",
        "head:",
        "head:0",
        "head:65536",
        "a b:1",
        "ada:pw@head:1",
        "/tmp",
    ],
)
def test_an_address_of_another_kind_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        start(monkeypatch, address)
    expected = "RAY_ADDRESS: expected host:port of a cluster's control service, such as 10.0.0.7:6379, auto or local"
    hint = "; for python -m jobs.submit and `ray job submit` set RAY_API_SERVER_ADDRESS" if "://" in address else ""
    if address.startswith("ray"):
        hint = ", of Ray Client, which no run goes through: submit the job instead, python -m jobs.submit"
    assert str(caught.value) == f"{expected}, got {address}{hint}"


def test_what_is_no_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(ray_session, "CONNECT_S", 0.5)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RunFailed, match=rf"^RAY_ADDRESS: expected a running cluster at {address}, which does not"):
            ray_session.start_ray(1, 0.0)


@pytest.mark.parametrize(
    ("service", "variables", "mode"),
    [
        (None, {}, "disabled"),
        (None, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "disabled"),
        (TOKEN, {"RAY_AUTH_TOKEN": TOKEN}, "token"),
        (TOKEN, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}, "token"),
        (TOKEN, {"RAY_AUTH_TOKEN_PATH": "{home}/of-mine"}, "token"),
        (TOKEN, {"HOME": "{home}/kept"}, "token"),
        (TOKEN, {"RAY_USE_TLS": "1"}, None),
    ],
    indirect=["service"],
)
def test_the_clusters_mode_is_taken_as_it_is_found(
    service: str, variables: dict[str, str], mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of-mine").write_text(f"{TOKEN}\n")
    (tmp_path / "kept" / ".ray").mkdir(parents=True)
    (tmp_path / "kept" / ".ray" / "auth_token").write_text(TOKEN)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert ray_session._mode(service, "RAY_ADDRESS", 5.0) == mode


@pytest.mark.parametrize(
    ("service", "variables", "message"),
    [
        (TOKEN, {}, "TOKEN: expected the token of the cluster at {0}, which asks for it, got none"),
        (TOKEN, {"TOKEN": "f" * 64}, "TOKEN: expected the token of the cluster at {0}, got one that it rejects"),
        (TOKEN, {"TOKEN": "a\nb"}, "TOKEN: expected the token of the cluster at {0}, got one that it rejects"),
        (TOKEN, {"TOKEN_PATH": "{1}/wrong"}, "TOKEN_PATH: expected the token of the cluster at {0}, got one that it"),
        (TOKEN, {"TOKEN_PATH": "{1}/none"}, "TOKEN_PATH: expected a file with a token, got {1}/none: No such file"),
        (TOKEN, {"TOKEN_PATH": "{1}/empty"}, "TOKEN_PATH: expected a file with a token, got {1}/empty: nothing in it"),
    ],
    indirect=["service"],
)  # fmt: skip
def test_a_token_that_is_missing_or_refused_is_one_line(
    service: str, variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "wrong").write_text("f" * 64)
    for name, value in variables.items():
        monkeypatch.setenv(f"RAY_AUTH_{name}", value.format(service, tmp_path))
    with pytest.raises(ConfigError) as caught:
        start(monkeypatch, service)
    assert str(caught.value).startswith(f"RAY_AUTH_{message.format(service, tmp_path)}")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "in_job", "sent"),
    [
        ({"127.0.0.1": "ALIVE", "127.0.0.2": "ALIVE"}, False, 0),
        ({"127.0.0.1": "ALIVE", "203.0.113.7": "DEAD"}, False, 0),
        ({"127.0.0.1": "ALIVE", "203.0.113.7": "ALIVE", "203.0.113.8": "ALIVE"}, False, 2),
        ({"203.0.113.7": "ALIVE"}, True, 0),
    ],
    ids=["this machine", "a dead node", "other nodes", "a job's own working directory"],
)
def test_other_nodes_get_the_checkout(
    nodes: dict[str, str], in_job: bool, sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = gcs_service_pb2.GetAllNodeInfoReply()
    for address, state in nodes.items():
        reply.node_info_list.add(node_manager_address=address, state=state)
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", given.update)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if in_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(Service(TOKEN, reply.SerializeToString())) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = ray_session.start_ray(1, 5.0)
    assert given.get("runtime_env") == ({"working_dir": str(ROOT)} if sent else None)
    files = r", this checkout \(\S+ MB in [\d,]+ files\) sent to 2 other nodes" if sent else ""
    assert re.fullmatch(rf"cluster at 10\.0\.0\.1:6379{files}", said)


def test_a_checkout_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dir, "INIT_BYTES", 2**20)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    with pytest.raises(ConfigError) as caught:
        working_dir.checkout_for(["203.0.113.7"])
    message = str(caught.value)
    assert message.startswith("the checkout for the nodes of RAY_ADDRESS: expected a folder of less than 1 MiB")
    assert "largest: tests (" in message


def test_an_unknown_mode_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    with pytest.raises(ConfigError, match=r"^RAY_AUTH_MODE: expected token or disabled, got 'tokens'$"):
        ray_session.start_ray(1, 5.0)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(ray, "init", late)
    expected = "Ray: expected its processes to start on this machine, got The current node timed out during startup."
    with pytest.raises(RunFailed, match=f"^{re.escape(expected)}$"):
        ray_session.start_ray(1, 5.0)
