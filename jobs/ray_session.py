"""Connects a job to Ray: to the cluster at `RAY_ADDRESS`, or to one that it starts for itself."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.controller import RunFailed
from cluster.cpus import allowed_cpus
from cluster.network import accepts_connections
from cluster.text import count
from cluster.timeouts import run_with_timeout
from jobs.ray_token import check_token, token_here
from jobs.signals import termination_signals
from jobs.working_dir import checkout_for
from simmatch.config import ConfigError

CONNECT_S = 10.0
"""Longest wait for a cluster to accept a connection; `ray.init` itself tries for minutes if nothing listens."""

SHUT_DOWN_S = 20.0
"""Longest wait for Ray's shutdown, which has no timeout of its own if the head is gone."""

HEADLESS_S = 600
"""Seconds without an answer from the head after which Ray ends a driver, without a message. Ray's own 60 s can be too
short to detect the failure and record why the run has ended."""


ADDRESS = re.compile(r"(?:\[[\da-f:.]+\]|[^\s:/@\[\]]+):(\d{1,5})", re.IGNORECASE)
HIGHEST_PORT = 65535

QUESTION = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""A harmless request to a cluster's control service, which every authorised client may make."""

ALIVE = 0
"""State of a node in the answer to it."""


def start_ray(cpus: int, limit_s: float) -> str:
    """Join the cluster of `RAY_ADDRESS`, or start an embedded one for this run. Returns a description of it.

    A running cluster is joined whether or not it asks for a token; an embedded one asks for a token unless
    `RAY_AUTH_MODE` says otherwise. Other nodes of a running cluster get the checkout that this process runs from,
    unless Ray brought it here as the working directory of a job.

    Raises
    ------
    ConfigError
        `RAY_ADDRESS`, or the token for it, is not what the cluster expects, or the checkout is too large for Ray.
    RunFailed
        The address does not answer, or not within `CONNECT_S` and `limit_s`; or Ray does not start here.
    """
    # read when ray is imported: no usage reports, and accelerators stay visible to actors that reserve none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return _embedded(cpus) if embeds_ray() else _joined(os.environ["RAY_ADDRESS"], limit_s)


def embeds_ray() -> bool:
    """Whether this process starts a Ray of its own, on this machine alone, rather than join a cluster."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def _embedded(cpus: int) -> str:
    # otherwise ray uses the machine's own address instead of loopback
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token").lower()
    if mode not in ("token", "disabled"):
        raise ConfigError(f"RAY_AUTH_MODE: expected token or disabled, got {mode!r}")
    if "ray" not in sys.modules and token_here(kept=False) is None:
        # ray would write one to ~/.ray/auth_token, which every user of the machine may read
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    try:
        with own_signals():
            ray.init(
                address="local",
                num_cpus=max(cpus, allowed_cpus()),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # such as a machine too busy to start its processes in time
        raise RunFailed(f"Ray: expected its processes to start on this machine, got {error}") from error
    return "embedded" if mode == "token" else "embedded, open to every process of this machine"


def check_cluster(limit_s: float) -> None:
    """Whether the cluster of `RAY_ADDRESS` answers this process; joins nothing. Of no cluster there is nothing to ask.

    Raises
    ------
    ConfigError, RunFailed
        As of `start_ray`.
    """
    if not embeds_ray():
        _found(os.environ["RAY_ADDRESS"], limit_s)


def _found(address: str, limit_s: float) -> tuple[str | None, str | None]:
    """host:port of the control service, and `RAY_AUTH_MODE` of the cluster; None where that is not known."""
    where, target = _expected(address), _control_address(address)
    if target is None:
        return None, None
    if not accepts_connections(target, CONNECT_S):
        raise RunFailed(f"{where}, which accepts no connection within {CONNECT_S:g} s")
    return target, _mode(target, where, CONNECT_S + limit_s)


def _expected(address: str) -> str:
    return f"RAY_ADDRESS: expected a running cluster at {address}"


def _joined(address: str, limit_s: float) -> str:
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEADLESS_S))
    target, mode = _found(address, limit_s)
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    nodes = [] if target is None or mode is None else _other_nodes(target, mode, CONNECT_S + limit_s)
    code = checkout_for(nodes)
    import ray

    init = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    if code is not None:
        init = partial(init, runtime_env={"working_dir": str(code.folder)})
    try:
        with own_signals():
            run_with_timeout(CONNECT_S + limit_s, "ray.init", init)
    except Exception as error:  # such as another version of Ray, or a wrong token
        raise RunFailed(f"{_expected(address)}, got {error}") from error
    joined = ray.get_runtime_context().gcs_address
    sent = "" if code is None else f", this checkout ({code}) sent to {count(len(nodes), 'other node')}"
    return f"cluster at {joined}{', which asks for no token' if mode == 'disabled' else ''}{sent}"


def _other_nodes(target: str, mode: str, limit_s: float) -> list[str]:
    """Addresses of the cluster's living nodes that are not on this machine."""
    from ray.core.generated import gcs_service_pb2

    reply_of: Any = vars(gcs_service_pb2)["GetAllNodeInfoReply"]  # made at run time, unknown to type checkers
    _, reply = _answer(target, token_here() if mode == "token" else None, limit_s)
    here = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    alive = {node.node_manager_address for node in reply_of.FromString(reply).node_info_list if node.state == ALIVE}
    return sorted(address for address in alive - here if not address.startswith("127."))


def _control_address(address: str) -> str | None:
    """host:port of the control service; None where Ray has to look for it.

    Raises
    ------
    ConfigError
        The address is of another kind.
    """
    if address == "auto":
        try:
            folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
            current = (folder / "ray" / "ray_current_cluster").read_text().strip()
        except (OSError, ValueError):
            return None
        return current if ADDRESS.fullmatch(current) and accepts_connections(current, CONNECT_S) else None
    match = ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[1]) <= HIGHEST_PORT:
        raise ConfigError(
            "RAY_ADDRESS: expected host:port of a cluster's control service, such as 10.0.0.7:6379, auto or local, "
            f"got {address}{_hint(address)}"
        )
    return address


def _hint(address: str) -> str:
    if address.startswith("ray://"):
        return ", of Ray Client, which no run goes through: submit the job instead, python -m jobs.submit"
    return "; for python -m jobs.submit and `ray job submit` set RAY_API_SERVER_ADDRESS" if "://" in address else ""


def _mode(target: str, where: str, limit_s: float) -> str | None:
    """`RAY_AUTH_MODE` of the cluster: `token` or `disabled`; None where that cannot be determined.

    Both sides take it from their environment; if they differ, Ray's calls fail, some of them much later.

    Raises
    ------
    ConfigError
        The cluster asks for a token, and there is none here, or a wrong one.
    RunFailed
        What listens there is not a Ray cluster.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("", "0", "false"):
        return None
    answer, _ = _answer(target, None, limit_s)
    if answer == "OK":
        return "disabled"
    if answer in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        raise RunFailed(f"{where}, which does not answer as a control service does")
    if answer != "UNAUTHENTICATED":
        return None
    check_token(target, lambda token: _answer(target, token, limit_s)[0] == "OK")
    return "token"


def _answer(target: str, token: str | None, limit_s: float) -> tuple[str, bytes]:
    """The control service's answer to `QUESTION`: the name of a gRPC status, and the message where that is OK."""
    import grpc  # type: ignore[import-untyped]

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return "OK", channel.unary_unary(QUESTION)(b"", metadata=metadata, timeout=limit_s)
        except grpc.RpcError as error:
            return str(error.code().name), b""
        except ValueError as error:  # characters that no header may have
            return str(error), b""


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep our signal handlers while `ray.init` runs, which would replace them, and starts processes.

    Its handler of SIGTERM exits with status 15 before the run is recorded. SIGHUP is blocked in the processes that it
    starts: a closed terminal sends it to each of them, but the job ends them in order.
    """
    before = {signum: signal.getsignal(signum) for signum in termination_signals()}
    put = signal.signal

    def keep(signum: int, handler: Any) -> Any:
        return signal.getsignal(signum) if signum == signal.SIGTERM else put(signum, handler)

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited; Ray does so with SIGINT
    signal.signal = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = put
        for signum, handler in before.items():  # Ray's C++ may have changed the handlers, too
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def shut_down_ray() -> bool:
    """Leave the cluster; returns whether that ended in time."""
    ray = sys.modules.get("ray")
    if ray is None:
        return True
    try:
        run_with_timeout(SHUT_DOWN_S, "ray.shutdown", ray.shutdown)
    except TimeoutError:
        return False
    return True
