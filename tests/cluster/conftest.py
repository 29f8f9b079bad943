"""Ranks as real processes that meet over gloo on loopback, and small runs on the digits.

A rank is forked from a server that has imported torch once, so that three of them cost less than a second.
"""

from __future__ import annotations

import http.server
import logging
import multiprocessing as mp
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import pytest
import torch

from cluster.collectives import TorchExchange, connect_store, join_group, open_store
from cluster.config import RunConfig
from simmatch.config import parse
from simmatch.sharding.exchange import IdentityExchange
from tests.cluster.actors import assert_gone, model, train
from tests.cluster.ray_nodes import Nodes
from tests.exchanges import results

# Read when ray is imported. A developer's own settings must not decide what the tests see.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else ray writes one into the home directory
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # what Ray calls staying on loopback
os.environ.pop("RAY_ADDRESS", None)

LOOPBACK = "127.0.0.1"
PRELOAD = ["torch.distributed", "cluster.training", "sklearn.datasets", "sklearn.linear_model", "pytest", "hypothesis"]

Outcome = Any
"""What a rank's program returned, or the exception that it raised; ChildProcessError where the process died."""


def meet(pipe: Connection, rank: int, world_size: int, timeout_s: float, device: str) -> TorchExchange:
    """The rendezvous of cluster.collectives; the store's port travels through the test."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"  # as cluster.worker does
    if device == "cuda":
        torch.cuda.set_device(rank)
    if rank == 0:
        store, port = open_store(LOOPBACK, timeout_s)
        pipe.send(port)
    else:
        store = connect_store(LOOPBACK, pipe.recv(), timeout_s)
    return join_group(store, 0, rank, world_size, torch.device(device), timeout_s)


def rank_main(
    pipe: Connection,
    program: Callable[..., Any],
    rank: int,
    world_size: int,
    timeout_s: float,
    device: str,
    arguments: tuple[Any, ...],
) -> None:
    """Meet the other ranks, run the program, tell the outcome, and stay until all have told theirs."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    exchange: Any = IdentityExchange()
    try:
        if world_size > 1:
            exchange = meet(pipe, rank, world_size, timeout_s, device)
        with torch.no_grad():
            outcome = program(exchange, *arguments)
    except Exception as error:
        outcome = error
    pipe.send((outcome, exchange.num_exchanges))
    pipe.poll(timeout_s)  # nobody leaves while another may still read from it
    os._exit(0)  # a broken group is never cleaned up: its destructors may wait for the missing


class Ranks:
    """Runs a program on ranks that are processes.

    Attributes
    ----------
    num_exchanges: exchanges that each rank started in the last run.
    """

    def __init__(self) -> None:
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.num_exchanges: list[int] = []

    def __call__(
        self,
        program: Callable[..., Any],
        world_size: int,
        *arguments: Any,
        limit_s: float = 60.0,
        exchange_timeout_s: float = 30.0,
        device: str = "cpu",
    ) -> list[Outcome]:
        """program(exchange, *arguments) on every rank. Fails, naming the ranks, when some do not end in time."""
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=rank_main,
                args=(theirs, program, rank, world_size, exchange_timeout_s, device, arguments),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            deadline = time.monotonic() + limit_s
            if world_size > 1:
                (port,) = self._receive(pipes[:1], deadline)
                for pipe in pipes[1:]:
                    pipe.send(port)
            told = self._receive(pipes, deadline)
            for pipe in pipes:
                with suppress(BrokenPipeError):  # a rank that died
                    pipe.send("leave")
        finally:
            for process in processes:
                process.join(5.0)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()
        self.num_exchanges = [count for _, count in told]
        return [outcome for outcome, _ in told]

    @staticmethod
    def _receive(pipes: list[Connection], deadline: float) -> list[Any]:
        """One message from every pipe."""
        found: dict[int, Any] = {}
        while len(found) < len(pipes):
            missing = [rank for rank in range(len(pipes)) if rank not in found]
            ready = wait([pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"ranks {missing} did not end in time")
            for rank in missing:
                if pipes[rank] in ready:
                    try:
                        found[rank] = pipes[rank].recv()
                    except EOFError:
                        found[rank] = (ChildProcessError(f"rank {rank} ended without a word"), -1)
        return [found[rank] for rank in range(len(pipes))]


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Run a program on 1 to 3 processes that exchange over gloo."""
    return Ranks()


@pytest.fixture(scope="session")
def digits_config() -> Callable[..., RunConfig]:
    """(channel shards, changes of top-level keys) → a run of seconds on the digits: conv 10, then supervised dense 10.

    121 test images in chunks of 20 per rank leave a last chunk of one image, of which some ranks hold nothing.
    10 channels are not divisible by 3.
    """

    def make(channel: int = 1, **changes: Any) -> RunConfig:
        plasticity = {"lr": 0.1, "tau": 0.5}
        conv = {
            "out_channels": 10,
            "kernel_size": 3,
            "stride": 2,
            "normalize": "contrast",
            "pool": 2,
            "train": {"batch_size": 20, "images": 200},
            "plasticity": plasticity,
            "dynamics": {"max_iterations": 40},
        }
        dense = {
            "out_channels": 10,
            "kernel_size": "full",
            "whiten": True,
            "supervised": True,
            "label_gain": 3.0,
            "train": {"batch_size": 20, "images": 120, "epochs": 2},
            "plasticity": plasticity,
            "dynamics": {"max_iterations": 40},
        }
        values = {
            "name": "digits-test",
            "data": {"name": "digits", "train_images": 240, "test_images": 121},
            "mesh": {"channel": channel},
            "model": {"layers": [conv, dense]},
            "encode_batch": 20,
            "log_every": 5,
            "checkpoint": {"every_steps": 4, "keep": 100},
            "probe": {"readout": "ridge"},
            "tracking": {"enabled": False},
            "cluster": {"poll_s": 0.05, "threads_per_rank": 1},
        }
        return parse(RunConfig, values | changes)

    return make


@pytest.fixture(scope="session")
def without_ray(
    ranks: Ranks, digits_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """The model that two processes without Ray learn, nothing going wrong."""
    run_dir = tmp_path_factory.mktemp("without-ray")
    results(ranks(train, 2, digits_config(2), run_dir))
    return model(run_dir).read_bytes()


@pytest.fixture
def broken_server() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers every request with status 500: its URI, and the credentials of each request."""
    got: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(str(self.headers.get("Authorization")))
            self.send_error(500)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray

    found = Nodes()
    ray.init(address=found.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    heads = [found.cluster.head_node.all_processes[kind][0].process.pid for kind in ("gcs_server", "raylet")]
    processes = [*heads, *(child.pid for pid in heads for child in psutil.Process(pid).children(recursive=True))]
    yield found
    ray.shutdown()
    found.cluster.shutdown()
    assert_gone(processes)
