"""A job's way into Ray: the cluster of `RAY_ADDRESS`, or one of its own for as long as it runs."""

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
from pathlib import Path
from typing import Any

from cluster.controller import RunFailed
from cluster.cpus import allowed_cpus
from cluster.network import accepts_connections
from cluster.timeouts import run_with_timeout
from jobs.signals import termination_signals
from simmatch.config import ConfigError

CONNECT_S = 10.0
"""Longest wait for a cluster to take a connection; `ray.init` itself tries for minutes where nobody listens."""

SHUT_DOWN_S = 20.0
"""Longest wait for Ray at the end; without the head of its cluster it has none of its own."""

HEADLESS_S = 600
"""Ray ends a driver that has not heard of the head for so long, without a word. Its 60 s could be less than it takes
to notice and to write down why the run has ended."""


ADDRESS = re.compile(r"(?:\[[\da-f:.]+\]|[^\s:/@\[\]]+):(\d{1,5})", re.IGNORECASE)
HIGHEST_PORT = 65535

QUESTION = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""Of no consequence, to a cluster's control service: whoever may not ask it may ask nothing."""


def start_ray(cpus: int, limit_s: float) -> str:
    """Join the cluster of `RAY_ADDRESS`, or start an embedded one for this run. Returns a word on which.

    A cluster is joined as it is found, whether it asks for a token or not; one that is started here asks for one,
    unless `RAY_AUTH_MODE` says otherwise.

    Raises
    ------
    ConfigError
        `RAY_ADDRESS`, or the token for it, is not what the cluster expects.
    RunFailed
        Nobody answers at the address, or not within `CONNECT_S` and `limit_s`.
    """
    # read when ray is imported: no usage reports, and accelerators stay visible to actors that reserve none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    return _embedded(cpus) if address in ("", "local") else _joined(address, limit_s)


def _embedded(cpus: int) -> str:
    # otherwise ray takes the machine's own address in place of loopback
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token").lower()
    if mode not in ("token", "disabled"):
        raise ConfigError(f"RAY_AUTH_MODE: expected token or disabled, got {mode!r}")
    if "ray" not in sys.modules and _token(kept=False) is None:
        # by itself ray keeps one in ~/.ray/auth_token, which every user of the machine may read
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    with own_signals():
        ray.init(
            address="local",
            num_cpus=max(cpus, allowed_cpus()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return "embedded" if mode == "token" else "embedded, open to every process of this machine"


def _joined(address: str, limit_s: float) -> str:
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEADLESS_S))
    where = f"RAY_ADDRESS: expected a running cluster at {address}"
    place = _place(address)
    mode = None
    if place is not None:
        if not accepts_connections(place, CONNECT_S):
            raise RunFailed(f"{where}, found nobody who takes a connection within {CONNECT_S:g} s")
        mode = _mode(place, where, CONNECT_S + limit_s)
        if mode is not None:
            os.environ["RAY_AUTH_MODE"] = mode
    import ray

    try:
        with own_signals():
            run_with_timeout(
                CONNECT_S + limit_s, "ray.init", lambda: ray.init(log_to_driver=False, logging_level=logging.ERROR)
            )
    except Exception as error:  # whatever Ray finds wrong: its version, a token
        raise RunFailed(f"{where}, got {error}") from error
    found = ray.get_runtime_context().gcs_address
    return f"cluster at {found}{', which asks for no token' if mode == 'disabled' else ''}"


def _place(address: str) -> str | None:
    """host:port of the control service; None where Ray has to find it.

    Raises
    ------
    ConfigError
        The address is of another kind.
    """
    if address == "auto":
        try:
            folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
            found = (folder / "ray" / "ray_current_cluster").read_text().strip()
        except (OSError, ValueError):
            return None
        return found if ADDRESS.fullmatch(found) and accepts_connections(found, CONNECT_S) else None
    match = ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[1]) <= HIGHEST_PORT:
        raise ConfigError(
            "RAY_ADDRESS: expected host:port of a cluster's control service, such as 10.0.0.7:6379, auto or local, "
            f"got {address}{_HINT if '://' in address else ''}"
        )
    return address


_HINT = "; for `ray job submit` set RAY_API_SERVER_ADDRESS"


def _mode(place: str, where: str, limit_s: float) -> str | None:
    """`RAY_AUTH_MODE` as the cluster has it: `token` or `disabled`; None where that is not to be found out.

    Ray takes it from the environment, on either side: where they differ its calls fail, some much later.

    Raises
    ------
    ConfigError
        The cluster asks for a token, and there is none here or another one.
    RunFailed
        What listens there is no cluster.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("", "0", "false"):
        return None
    answer = _answer(place, None, limit_s)
    if answer == "OK":
        return "disabled"
    if answer in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        raise RunFailed(f"{where}, found something that does not answer as its control service does")
    if answer != "UNAUTHENTICATED":
        return None
    token = _token()
    if token is None:
        raise ConfigError(f"RAY_AUTH_TOKEN: expected the token of the cluster at {place}, which asks for it, got none")
    if _answer(place, token, limit_s) != "OK":
        variable = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), KEPT)
        raise ConfigError(f"{variable}: expected the token of the cluster at {place}, got one that it refuses")
    return "token"


KEPT = "~/.ray/auth_token"
"""Where Ray looks for a token last."""


def _token(*, kept: bool = True) -> str | None:
    """The token as Ray looks for it; None where there is none.

    kept: in `KEPT` as well.

    Raises
    ------
    ConfigError
        `RAY_AUTH_TOKEN_PATH` is not a file with a token; Ray would end the process.
    """
    token, path = (os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if token:
        return token.strip()
    try:
        text = Path(path or KEPT).expanduser().read_text().strip() if path or kept else ""
    except (OSError, ValueError) as error:
        text, why = "", getattr(error, "strerror", None) or str(error)
    else:
        why = "nothing in it"
    if path and not text:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: expected a file with a token, got {path}: {why}")
    return text or None


def _answer(place: str, token: str | None, limit_s: float) -> str:
    """What the control service says to `QUESTION`, by the name of gRPC's status."""
    import grpc  # type: ignore[import-untyped]

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(QUESTION)(b"", metadata=metadata, timeout=limit_s)
        except grpc.RpcError as error:
            return str(error.code().name)
        except ValueError as error:  # characters that no header may have
            return str(error)
    return "OK"


@contextmanager
def own_signals() -> Iterator[None]:
    """Around `ray.init`, which would put a handler of its own in place of ours, and starts processes.

    Its handler of SIGTERM exits with status 15, past what is to be recorded. The processes do not see the terminal
    close, which tells every process that belongs to it: the job is to end them in order.
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
        for signum, handler in before.items():  # of the system's too, which Ray's C++ may have changed
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def shut_down_ray() -> bool:
    """Leave the cluster; returns whether that came to an end."""
    ray = sys.modules.get("ray")
    if ray is None:
        return True
    try:
        run_with_timeout(SHUT_DOWN_S, "ray.shutdown", ray.shutdown)
    except TimeoutError:
        return False
    return True
