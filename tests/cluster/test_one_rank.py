"""Work of one rank that takes longer than any time limit: its peers wait, unless it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.collectives import PeerTimeout
from cluster.config import RunConfig
from cluster.messages import Outbox
from cluster.one_rank import on_one_rank
from cluster.timeouts import run_with_timeout
from cluster.training import Assignment, Training
from cluster.worker import Worker
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from tests.exchanges import results

CPU = torch.device("cpu")
LIMIT_S, PAUSE_S = 1.0, 0.2
LONG_S = 2.0


def compute(seconds: float = LONG_S) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        torch.rand(200, 200) @ torch.rand(200, 200)


def hang() -> None:
    time.sleep(LONG_S)


def wait() -> None:
    """For a store, say, with a limit of its own."""
    run_with_timeout(10.0, "the store", hang)


def fail() -> None:
    raise ValueError("no such thing")


def together(exchange: Exchange, work: Callable[[], None]) -> None:
    on_one_rank(work if exchange.rank == 0 else None, exchange, Outbox(), device=CPU, pause_s=PAUSE_S)


def test_peers_give_up_a_rank_that_stands_still(ranks: Any) -> None:
    _, peer = ranks(together, 2, hang, exchange_timeout_s=LIMIT_S)
    assert isinstance(peer, PeerTimeout), peer


def test_peers_wait_for_a_call_that_has_a_limit(ranks: Any) -> None:
    assert results(ranks(together, 2, wait, exchange_timeout_s=LIMIT_S)) == [None, None]


def test_what_the_work_raises_is_raised_on_its_rank() -> None:
    with pytest.raises(ValueError, match="no such thing"):
        on_one_rank(fail, IDENTITY, Outbox(), device=CPU, pause_s=PAUSE_S)


def slowly(exchange: Exchange, config: RunConfig, run_dir: Path) -> None:
    """A run in which one calibration takes long."""
    real = SimilarityMatchingConv2d.set_input

    def set_input(layer: SimilarityMatchingConv2d, *arguments: Any) -> None:
        if layer.whiten:
            compute()
        real(layer, *arguments)

    SimilarityMatchingConv2d.set_input = set_input  # type: ignore[method-assign]
    train(exchange, config, run_dir)


def train(exchange: Exchange, config: RunConfig, run_dir: Path) -> None:
    Training(Assignment(config, run_dir, exchange.rank), Mesh.of_owners(exchange), Outbox(), CPU).run()


def test_a_calibration_longer_than_all_limits_changes_nothing(
    ranks: Any, digits_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    limits = {"collective_timeout_s": LIMIT_S, "stall_timeout_s": LIMIT_S}
    config = digits_config(2, cluster=limits)
    for name, program, limit_s in (("long", slowly, LIMIT_S), ("short", train, 30.0)):
        (tmp_path / name).mkdir()
        results(ranks(program, 2, config, tmp_path / name, exchange_timeout_s=limit_s))
    weights, expected = (tmp_path / name / "model/model.safetensors" for name in ("long", "short"))
    assert weights.read_bytes() == expected.read_bytes()


class Fit(Training):
    """A rank whose whole run is the fit of a readout."""

    work: Callable[[], None]

    def __init__(self, _: Assignment, mesh: Mesh, report: Outbox, device: torch.device) -> None:
        self.mesh, self.report, self.device = mesh, report, device

    def run(self) -> None:
        on_one_rank(type(self).work, self.mesh.everyone, self.report, device=self.device, pause_s=PAUSE_S)


@pytest.mark.parametrize(("work", "moves"), [(compute, True), (hang, False), (wait, True)])
def test_a_rank_moves_while_its_work_computes(
    digits_config: Callable[..., RunConfig], tmp_path: Path, work: Callable[[], None], moves: bool
) -> None:
    """Alone, so that no exchange times out; a stall is recognised by `idle_s`."""
    worker = Worker(Assignment(digits_config(1), tmp_path, 0))
    worker.training_class = type("Fit", (Fit,), {"work": staticmethod(work)})  # type: ignore[misc]
    worker.begin(1)
    idle = [0.0]
    while not (status := worker.poll(0)).done:
        idle.append(status.idle_s)
        time.sleep(0.02)
    assert status.failure is None
    assert (max(idle) < LONG_S / 2) == moves
