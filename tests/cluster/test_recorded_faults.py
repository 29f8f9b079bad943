"""Ranks that record faults on their device, as with kernels on GPUs: what the program makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config import RunConfig
from cluster.messages import Outbox
from cluster.monitors import TrainingFault
from cluster.training import Assignment
from simmatch.sharding.mesh import Mesh
from tests.exchanges import ThreadExchange, run_owners
from tests.faults import FaultPlan, Kind, faulty_training
from tests.simmatch.kernels import scripted

LAYER = {
    "out_channels": 10,
    "kernel_size": 3,
    "stride": 2,
    "normalize": "contrast",
    "train": {"batch_size": 20, "positions": 5},
    "dynamics": {"exchange": "gather_state"},
}


@pytest.mark.parametrize(
    ("kind", "message"), [("nan feedforward", "non-finite weights on rank 1"), ("exception", "exception on rank 1")]
)
@pytest.mark.parametrize(("step", "saved"), [(7, [4]), (9, [4, 8])])
def test_a_recorded_fault_ends_the_training_of_all_ranks_before_anything_is_kept(
    step: int,
    saved: list[int],
    kind: Kind,
    message: str,
    digits_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looks come at every fifth update and before a checkpoint, every fourth; they name the update of the fault."""
    scripted.use(monkeypatch)
    config = digits_config(2, model={"layers": [LAYER]})

    def program(exchange: ThreadExchange) -> None:
        assignment, outbox = Assignment(config, tmp_path, exchange.rank), Outbox()
        plan = FaultPlan(rank=1, layer=0, step=step, kind=kind)
        faulty_training(plan)(assignment, Mesh.of_owners(exchange), outbox, torch.device("cpu")).run()

    outcomes = run_owners(2, program)
    assert [type(outcome) for outcome in outcomes] == [TrainingFault] * 2, outcomes
    assert {str(outcome) for outcome in outcomes} == {f"layer 0, step {step}: {message}"}
    assert {outcome.diverged for outcome in outcomes} == {kind == "nan feedforward"}
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [int(folder.name.rpartition("-")[2]) for folder in folders] == saved
