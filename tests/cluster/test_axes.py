"""Runs over the axes of a mesh, without Ray: stages give the bits of one rank, and any mesh reads any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.checkpoints.manifest import Cursor, folder_of, read_manifest
from cluster.collectives import TorchExchange
from cluster.config import RunConfig
from cluster.connections import join_mesh
from cluster.failures import classify, group_failure
from cluster.messages import LayerMetrics, Message, Outbox, Progress, RankStatus, ShardWritten
from cluster.monitors import TrainingFault
from cluster.policy import Failure
from cluster.training import Assignment, Stopped, Training
from simmatch.config import parse
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from tests.cluster.test_checkpoint import commit_all, exported
from tests.exchanges import of_type, results
from tests.faults import FaultPlan, faulty_training

ConfigMaker = Callable[..., RunConfig]
CPU = torch.device("cpu")
UPDATES, BEGINS = 20, 5
"""Updates of the pass, and those before the last layer begins."""


@pytest.fixture(scope="module")
def together(digits_config: ConfigMaker) -> ConfigMaker:
    """(extents of the mesh) → a run in float64 of three layers that learn together, the last one, which is whitened and
    has labels, from update `BEGINS` on."""

    def make(*, later: int = BEGINS, **mesh: int) -> RunConfig:
        values = digits_config(dtype="float64").model_dump(mode="json")
        conv, dense = values["model"]["layers"]
        train = {"batch_size": 20, "images": 200, "epochs": 2}
        for layer in (conv, dense):
            layer["dynamics"] |= {"solver": "accelerated"}  # one whoever holds the rows
        conv |= {"train": train, "pool": 3}
        middle = conv | {"kernel_size": 2, "stride": 1, "pool": 2, "normalize": "none"}
        dense |= {"train": train | {"start_after": later}}
        values["model"] |= {"layers": [conv, middle, dense], "schedule": "together"}
        values["mesh"] = mesh
        return parse(RunConfig, values)

    return make


class Asked(Outbox):
    """A rank that is asked to stop when it reports an update of the pass."""

    at: int | None = None

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        self.stopping |= progress.phase == "learn" and progress.done == self.at


def train(
    exchange: Exchange, config: RunConfig, run_dir: Path, resume: Path | None = None, asked: int | None = None
) -> list[Message]:
    outbox = Asked(exchange.rank)
    outbox.at = asked
    cpu = torch.device("cpu")
    mesh = Mesh()
    if isinstance(exchange, TorchExchange):
        mesh = join_mesh(exchange, config.mesh, cpu, link_timeout_s=exchange.timeout_s)
    training = Training(Assignment(config, run_dir, exchange.rank, resume=resume), mesh, outbox, cpu)
    if asked is None:
        training.run()
    else:
        with pytest.raises(Stopped):
            training.run()
    return outbox.messages


class Run:
    """A run to its end, or until it is asked to stop, and its committed checkpoints."""

    def __init__(self, ranks: Any, config: RunConfig, run_dir: Path, *more: Any) -> None:
        run_dir.mkdir(parents=True)
        self.config, self.run_dir = config, run_dir
        self.messages = results(ranks(train, config.mesh.world_size, config, run_dir, *more))
        self.cursors = commit_all(config, run_dir, self.messages)

    @property
    def weights(self) -> dict[str, Tensor]:
        return exported(self.run_dir)


@pytest.fixture(scope="module")
def alone(ranks: Any, together: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(ranks, together(), tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def stages(ranks: Any, together: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(ranks, together(layer=2), tmp_path_factory.mktemp("stages") / "run")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit; V is scaled in the end by sums over images, of which every rank adds its share: 1e-12."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("label"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-9, as between shard counts in `test_parity`: rounding, and the eigenvectors of the whitening."""
    for name, tensor in expected.items():
        scale = float(tensor.abs().amax()) if tensor.numel() else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9 * scale, msg=name)


def test_two_stages_give_the_bits_of_one_rank(alone: Run, stages: Run) -> None:
    assert_equal(stages.weights, alone.weights)


def test_a_checkpoint_holds_all_layers_after_one_update_of_the_pass(alone: Run, stages: Run) -> None:
    """Layers 0 and 1 learn from every batch, layer 2 from those after the fifth: so many images in all."""
    expected = [
        Cursor(step=step, layer=0, updates=step, images=20 * (2 * step + max(0, step - BEGINS)))
        for step in (4, 8, 12, 16, 20)
    ]
    assert stages.cursors == alone.cursors == expected
    for step in (4, 8):
        one, two = (read_manifest(folder_of(run.run_dir, step)) for run in (alone, stages))
        assert one.layers == two.layers
        assert len(one.layers) == 3
        assert {key for file in one.files for key in file.shapes} == {key for file in two.files for key in file.shapes}


def test_what_each_stage_reports_is_reported_once(stages: Run) -> None:
    metrics = [[(each.layer, each.update) for each in of_type(own, LayerMetrics)] for own in stages.messages]
    begun = UPDATES - BEGINS
    of_layer = [
        [(layer, update) for update in range(5, count + 1, 5)] for layer, count in enumerate((UPDATES, UPDATES, begun))
    ]
    assert [sorted(own) for own in metrics] in (
        [of_layer[0], of_layer[1] + of_layer[2]],
        [of_layer[0] + of_layer[1], of_layer[2]],
    )
    for each in (message for own in stages.messages for message in of_type(own, LayerMetrics)):
        step = each.update + (BEGINS if each.layer == 2 else 0)
        assert each.images == 20 * (2 * step + max(0, step - BEGINS))


def fault_while_encoding(exchange: Exchange, config: RunConfig, run_dir: Path) -> str:
    """What a rank says of a fault that the first owner of its replica has found in a batch for the layer above."""
    assert isinstance(exchange, TorchExchange)
    mesh = join_mesh(exchange, config.mesh, CPU, link_timeout_s=exchange.timeout_s)
    training = Training(Assignment(config, run_dir, exchange.rank), mesh, Outbox(exchange.rank), CPU)
    layer = training.trainer.setup.new_layer(0)
    with pytest.raises(TrainingFault) as fault, training.encoding(0, layer):
        raise SharedFault("non-finite activities", [0])
    return str(fault.value)


def test_a_fault_of_a_replica_that_encodes_names_its_rank(ranks: Any, together: ConfigMaker, tmp_path: Path) -> None:
    """Replicas encode apart: the ranks of a fault are counted among the owners of one replica."""
    told = results(ranks(fault_while_encoding, 4, together(data=2, channel=2), tmp_path))
    assert told == [f"layer 0, step 1: non-finite activities on rank {first}" for first in (0, 0, 2, 2)]


@pytest.mark.parametrize(
    ("mesh", "step"),
    [
        ({}, 8),
        ({"layer": 3}, 4),
        ({"layer": 3}, 16),
        ({"layer": 2, "channel": 2}, 8),
        ({"data": 2, "layer": 2}, 4),
        ({"data": 3}, 16),
    ],
    ids=str,
)
def test_any_mesh_continues_from_a_checkpoint_of_two_stages(
    ranks: Any, together: ConfigMaker, alone: Run, stages: Run, tmp_path: Path, mesh: dict[str, int], step: int
) -> None:
    """Before and after the last layer begins. Shards of channels and replicas give the same up to rounding."""
    config = together(**mesh)
    run = Run(ranks, config, tmp_path / "run", folder_of(stages.run_dir, step))
    assert run.cursors == [cursor for cursor in alone.cursors if cursor.step > step]
    (assert_close if config.mesh.channel * config.mesh.data > 1 else assert_equal)(run.weights, alone.weights)


def test_stages_that_are_asked_to_stop_agree_on_the_update(
    ranks: Any, together: ConfigMaker, alone: Run, tmp_path: Path
) -> None:
    """The first stage decides, at the next multiple of `log_every`; the others end with that batch."""
    config = together(layer=3)
    stopped = Run(ranks, config, tmp_path / "stopped", None, 7)
    assert stopped.cursors[-1].step == 10
    assert not (stopped.run_dir / "model").exists()
    run = Run(ranks, together(layer=2), tmp_path / "again", folder_of(stopped.run_dir, 10))
    assert_equal(run.weights, alone.weights)


def test_replicas_write_every_row_once(ranks: Any, together: ConfigMaker, alone: Run, tmp_path: Path) -> None:
    """Of two replicas with two owners each the first one writes; any other mesh continues from there."""
    run = Run(ranks, together(data=2, channel=2), tmp_path / "run")
    assert [len(of_type(own, ShardWritten)) for own in run.messages] == [5, 5, 0, 0]
    assert [len(of_type(own, LayerMetrics)) > 0 for own in run.messages] == [True, False, False, False]
    assert_close(run.weights, alone.weights)
    later = Run(ranks, together(layer=3), tmp_path / "later", folder_of(run.run_dir, 12))
    assert later.cursors == alone.cursors[3:]
    assert_close(later.weights, alone.weights)


def fail(exchange: Exchange, config: RunConfig, run_dir: Path, plan: FaultPlan) -> Failure:
    """What a rank reports of a run in which one of them has a fault."""
    assert isinstance(exchange, TorchExchange)
    mesh = join_mesh(exchange, config.mesh, CPU, link_timeout_s=exchange.timeout_s)
    training = faulty_training(plan)(Assignment(config, run_dir, exchange.rank), mesh, Outbox(exchange.rank), CPU)
    try:
        training.run()
    except Exception as error:
        return classify(error)
    raise AssertionError("the fault had no effect")


@pytest.mark.parametrize(
    ("mesh", "rank", "layer", "kind", "expected"),
    [
        ({"layer": 2}, 1, 2, "nan lateral", "layer 2, step 9: non-finite "),
        ({"layer": 2}, 0, 0, "exception", "layer 0, step 9: InjectedError: injected"),
        ({"data": 2, "layer": 2}, 3, 2, "exception", "layer 2, step 9: exception on rank 3"),
        ({"data": 2}, 1, 0, "nan feedforward", "layer 0, step 9: non-finite "),
    ],
    ids=str,
)
def test_the_rank_with_a_fault_speaks_for_all(
    ranks: Any,
    together: ConfigMaker,
    tmp_path: Path,
    mesh: dict[str, int],
    rank: int,
    layer: int,
    kind: Any,
    expected: str,
) -> None:
    """Replicas hear of it at their next exchange, with the rank's number in the run; other stages only wait."""
    plan = FaultPlan(rank=rank, layer=layer, step=9, kind=kind)
    world_size = together(**mesh).mesh.world_size
    failures = results(ranks(fail, world_size, together(**mesh), tmp_path, plan, exchange_timeout_s=4.0))
    statuses = [RankStatus(number, True, failure, [], [], {"": 7}) for number, failure in enumerate(failures)]
    found = group_failure(statuses, 100.0, 100.0)
    assert found is not None
    assert expected in found.message
    assert not found.secondary
    assert found.diverged == kind.startswith("nan")


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "layer": 2, "channel": 4}, {"data": 2, "layer": 3, "channel": 2}, {"data": 16}], ids=str
)
def test_many_ranks_along_all_axes(
    ranks: Any, together: ConfigMaker, alone: Run, tmp_path: Path, mesh: dict[str, int]
) -> None:
    """Correct, not fast. With 16 replicas most have one image of a batch, and some two."""
    run = Run(partial(ranks, limit_s=500.0, exchange_timeout_s=200.0), together(**mesh), tmp_path / "run")
    assert run.cursors == alone.cursors
    assert_close(run.weights, alone.weights)
