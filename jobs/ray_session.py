"""A job's way into Ray: the cluster of `RAY_ADDRESS`, or one of its own for as long as it runs."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.controller import RunFailed
from cluster.cpus import allowed_cpus
from cluster.limits import within
from cluster.network import takes_connections
from jobs.ending import asking_to_end

CONNECT_S = 10.0
"""Longest wait for a cluster to take a connection; `ray.init` itself tries for minutes where nobody listens."""

SHUT_DOWN_S = 20.0
"""Longest wait for Ray at the end; without the head of its cluster it has none of its own."""

HEADLESS_S = 600
"""Ray ends a driver that has not heard of the head for so long, without a word. Its 60 s could be less than it takes
to notice and to write down why the run has ended."""


def start_ray(cpus: int, limit_s: float) -> str:
    """Join the cluster of `RAY_ADDRESS`, or start an embedded one for this run. Returns a word on which.

    Raises
    ------
    RunFailed
        Nobody answers at the address, or not within `CONNECT_S` and `limit_s`.
    """
    # read when ray is imported: no usage reports, and accelerators stay visible to actors that reserve none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEADLESS_S))
    else:
        # otherwise ray takes the machine's own address in place of loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "ray" not in sys.modules and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # by itself ray keeps one in ~/.ray/auth_token, which every user of the machine may read
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if address:
        where = f"RAY_ADDRESS: expected a running cluster at {address}"
        if re.fullmatch(r"[^/]+:\d+", address) and not takes_connections(address, CONNECT_S):
            raise RunFailed(f"{where}, found nobody who takes a connection within {CONNECT_S:g} s")
        try:
            with own_signals():
                within(
                    CONNECT_S + limit_s, "ray.init", lambda: ray.init(log_to_driver=False, logging_level=logging.ERROR)
                )
        except (ConnectionError, TimeoutError) as error:
            raise RunFailed(f"{where}, got {error}") from error
        return f"cluster at {ray.get_runtime_context().gcs_address}"
    with own_signals():
        ray.init(
            address="local",
            num_cpus=max(cpus, allowed_cpus()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return "embedded" if os.environ["RAY_AUTH_MODE"] == "token" else "embedded, open to every process of this machine"


@contextmanager
def own_signals() -> Iterator[None]:
    """Around `ray.init`, which puts a handler of its own in place of ours and starts processes.

    These do not see the terminal close, which tells every process that belongs to it: the job is to end them in order.
    """
    before = {signum: signal.getsignal(signum) for signum in asking_to_end()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited; Ray does so with SIGINT
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def shut_down_ray() -> bool:
    """Leave the cluster; returns whether that came to an end."""
    ray = sys.modules.get("ray")
    if ray is None:
        return True
    try:
        within(SHUT_DOWN_S, "ray.shutdown", ray.shutdown)
    except TimeoutError:
        return False
    return True
