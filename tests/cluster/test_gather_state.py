"""Whole runs with `exchange: gather_state` over gloo: the model of the other mode, bits that repeat, and faults."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.checkpoints.manifest import folder_of
from cluster.config import RunConfig
from cluster.messages import LayerMetrics
from cluster.monitors import TrainingFault
from simmatch.config import parse
from tests.cluster.test_checkpoint import commit_all, exported, run
from tests.cluster.test_parity import read, run_to_end, train, unchanging
from tests.exchanges import of_type
from tests.faults import FaultPlan

ConfigMaker = Callable[..., RunConfig]
MODE = "gather_state"


def with_dynamics(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with other dynamics in all layers."""
    values = config.model_dump(mode="json")
    for layer in values["model"]["layers"]:
        layer["dynamics"] |= changes
    return parse(RunConfig, values)


@pytest.fixture(scope="module")
def exact(digits_config: ConfigMaker) -> ConfigMaker:
    """(mode, shards) → the run in float64 by one solver in both modes, so that columns stop at the same iteration."""

    def make(mode: str, channel: int) -> RunConfig:
        return with_dynamics(digits_config(channel, dtype="float64"), exchange=mode, solver="accelerated")

    return make


@pytest.fixture(scope="module")
def single(exact: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The run on one rank with `every_iteration`, its checkpoints committed."""
    run_dir, config = tmp_path_factory.mktemp("single") / "run", exact("every_iteration", 1)
    commit_all(config, run_dir, run(ranks, config, run_dir))
    return run_dir, exported(run_dir)


@pytest.fixture(scope="module")
def triple(exact: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The run on three ranks with `gather_state`, and what they reported."""
    run_dir, config = tmp_path_factory.mktemp("triple") / "run", exact(MODE, 3)
    messages = run(ranks, config, run_dir)
    assert len(set(ranks.num_exchanges)) == 1
    commit_all(config, run_dir, messages)
    return run_dir, messages


@pytest.fixture(scope="module")
def pair(digits_config: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The run on two ranks in float32 with the solver that the mode chooses."""
    run_dir, config = tmp_path_factory.mktemp("pair") / "run", with_dynamics(digits_config(2), exchange=MODE)
    messages = run(ranks, config, run_dir)
    commit_all(config, run_dir, messages)
    return run_dir, messages


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-9, as between shard counts in `test_parity`: rounding, and the eigenvectors of the whitening."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().amax()) if tensor.numel() else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9 * scale, msg=name)


def test_a_run_gives_the_model_of_the_other_mode(single: Any, triple: Any) -> None:
    """Conv and supervised dense layers, 10 channels and uneven columns on three ranks."""
    assert_alike(exported(triple[0]), single[1])


def test_all_ranks_record_the_same(triple: Any) -> None:
    """Each looks at its own columns; what they report is about all of them.

    Only the traffic differs: rank 0 receives nothing of the calibrations that it broadcasts, and it alone counts the
    exchanges, of which all have made as many.
    """
    _, messages = triple
    metrics = [[unchanging(metrics) for metrics in of_type(own, LayerMetrics)] for own in messages]
    bytes_exchanged = [[each.bytes_exchanged for each in own] for own in metrics]
    assert bytes_exchanged[0] < bytes_exchanged[1] == bytes_exchanged[2]
    num_exchanges = [[each.num_exchanges for each in own] for own in metrics]
    assert num_exchanges[0][0] > 0
    assert num_exchanges[0] == sorted(set(num_exchanges[0]))
    assert num_exchanges[1] == num_exchanges[2] == [0.0] * len(metrics[0])
    without = [[dataclasses.replace(each, bytes_exchanged=0, num_exchanges=0) for each in own] for own in metrics]
    assert without[0] == without[1] == without[2]
    shares = [metrics.waiting_share for own in messages for metrics in of_type(own, LayerMetrics)]
    assert all(0.0 < share < 1.0 for share in shares)


def test_bytes_do_not_depend_on_images_or_iterations(triple: Any) -> None:
    """Between two records of the dense layer: by hand, in float64, with 10 · 2 · 2 inputs to a unit.

    A rank receives from each of two others 4 padded rows of W, M and V with a mark, as many of the sums with theirs,
    4 values a row and two marks for the bound; and at a record activities and inputs of 20 columns, 7 at most an owner,
    three figures and a mark; and after each fifth update, once here, four bytes that say whether it was asked to
    stop. The record counts what all three ranks receive.
    """
    _, messages = triple
    before, after = [metrics for metrics in of_type(messages[0], LayerMetrics) if metrics.layer == 1][-2:]
    updates = after.update - before.update
    update = 2 * (4 * (40 + 10 + 10) + 1) + 4 * 4 + 2
    moved = after.bytes_exchanged - before.bytes_exchanged
    assert moved == 3 * 2 * (8 * (updates * update + (10 + 40) * 7 + 4) + 4)
    assert after.num_exchanges - before.num_exchanges == 4 * updates + 2


def test_a_second_run_with_a_slow_rank_is_equal_bit_by_bit(
    ranks: Any, digits_config: ConfigMaker, pair: Any, tmp_path: Path
) -> None:
    config = with_dynamics(digits_config(2), exchange=MODE)
    found = run_to_end(ranks, config, tmp_path / "run", plans=(), late_rank=1)
    expected = read(pair[0], pair[1][0])
    assert found.exported == expected.exported
    assert list(map(unchanging, found.metrics)) == list(map(unchanging, expected.metrics))
    assert found.readout.accuracy > 0.4  # chance is 0.1 ± 0.03 on 121 images


def test_resuming_repeats_every_bit(ranks: Any, digits_config: ConfigMaker, pair: Any, tmp_path: Path) -> None:
    """From the middle of the supervised layer, whose V is gathered too."""
    config = with_dynamics(digits_config(2), exchange=MODE)
    run(ranks, config, tmp_path / "run", folder_of(pair[0], 16))
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (pair[0] / model).read_bytes()


def test_a_checkpoint_continues_under_the_other_mode(
    ranks: Any, exact: ConfigMaker, single: Any, triple: Any, tmp_path: Path
) -> None:
    """Three ranks with split columns → two with split rows; one rank with split rows → two with split columns."""
    run(ranks, exact("every_iteration", 2), tmp_path / "rows", folder_of(triple[0], 16))
    assert_alike(exported(tmp_path / "rows"), single[1])
    run(ranks, exact(MODE, 2), tmp_path / "columns", folder_of(single[0], 4))
    assert_alike(exported(tmp_path / "columns"), single[1])


@pytest.mark.parametrize(
    ("world_size", "plan", "kind"),
    [
        (2, FaultPlan(rank=1, layer=0, step=3, kind="nan feedforward"), "non-finite weights"),
        (3, FaultPlan(rank=2, layer=1, step=2, kind="exception"), "exception"),
    ],
)
def test_a_fault_on_one_rank_ends_all_at_the_same_exchange(
    ranks: Any, digits_config: ConfigMaker, tmp_path: Path, world_size: int, plan: FaultPlan, kind: str
) -> None:
    started = time.monotonic()
    config = with_dynamics(digits_config(world_size), exchange=MODE)
    outcomes = ranks(train, world_size, config, tmp_path, (plan,), exchange_timeout_s=40.0)
    assert time.monotonic() - started < 35.0  # nobody sat out an exchange's limit
    assert all(isinstance(outcome, TrainingFault) for outcome in outcomes), outcomes
    assert {str(outcome) for outcome in outcomes} == {
        f"layer {plan.layer}, step {plan.step}: {kind} on rank {plan.rank}"
    }
    assert len(set(ranks.num_exchanges)) == 1
    assert not (tmp_path / "model").exists()


def test_one_rank_alone_runs_the_same_code(ranks: Any, exact: ConfigMaker, single: Any, tmp_path: Path) -> None:
    """Bit by bit what the other mode computes: nothing is split, nothing moves."""
    found = run_to_end(ranks, exact(MODE, 1), tmp_path / "run")
    assert found.exported == (single[0] / "model" / "model.safetensors").read_bytes()
    assert found.metrics[-1].num_exchanges == 0.0
