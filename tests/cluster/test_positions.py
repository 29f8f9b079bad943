"""Runs that learn from some positions of each image: the same at any shard count, and again after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoints.committer import commit
from cluster.checkpoints.manifest import Manifest, folder_of
from cluster.config import RunConfig
from cluster.messages import Message, Outbox, ShardWritten
from cluster.monitors import TrainingFault
from cluster.training import Assignment, Training
from simmatch.config import parse
from simmatch.geometry import Patches
from simmatch.inputs import LayerInputs, Staged
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from tests.exchanges import of_type, results

ConfigMaker = Callable[..., RunConfig]
RunMaker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def with_positions(digits_config: ConfigMaker) -> RunMaker:
    """(channel shards, positions of the two convolutional layers) → a short run in float64.

    Contrast on images, whitening on pooled maps of 3 × 3 with labels; maps of 6 × 6 and of 3 × 3 activities.
    """

    def make(
        channel: int,
        positions: tuple[int | None, int | None] = (7, 4),
        exchange: str = "every_iteration",
        **changes: Any,
    ) -> RunConfig:
        values = digits_config(channel, dtype="float64", **changes).model_dump(mode="json")
        first, second = values["model"]["layers"]
        first |= {"kernel_size": 3, "stride": 1, "pool": 3}
        first["train"] |= {"images": 100, "positions": positions[0]}
        second |= {"kernel_size": 3, "padding": 1}
        second["train"] |= {"images": 80, "epochs": 2, "positions": positions[1]}
        for layer in (first, second):
            # one solver whoever holds the rows: `auto` would take another on one rank than on several
            layer["dynamics"] |= {"exchange": exchange, "solver": "accelerated"}
        return parse(RunConfig, values)

    return make


def train(exchange: Exchange, config: RunConfig, run_dir: Path, resume: Path | None = None) -> list[Message]:
    outbox = Outbox()
    Training(
        Assignment(config, run_dir, exchange.rank, resume=resume), Mesh.of_owners(exchange), outbox, torch.device("cpu")
    ).run()
    return outbox.messages


def run(ranks: Any, config: RunConfig, run_dir: Path, resume: Path | None = None) -> list[list[Message]]:
    run_dir.mkdir(parents=True)
    return results(ranks(train, config.mesh.world_size, config, run_dir, resume))


def exported(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def commit_step(config: RunConfig, run_dir: Path, messages: list[list[Message]], step: int) -> Path:
    """The manifest of one checkpoint, as the controller writes it from what all ranks have reported."""
    parts = [part for own in messages for part in of_type(own, ShardWritten) if part.cursor.step == step]
    manifest = Manifest(
        cursor=parts[0].cursor,
        config=config.model_dump(mode="json"),
        layers=[parts[0].layers[index] for index in sorted(parts[0].layers)],
        shards=[part.shard for part in parts],
        constants=[constant for part in parts for constant in part.constants],
    )
    commit(folder_of(run_dir, step), manifest)
    return folder_of(run_dir, step)


@pytest.fixture(scope="module")
def alone(ranks: Any, with_positions: RunMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, with its checkpoints of steps 4 (layer 0) and 8 (layer 1) committed."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    config = with_positions(1)
    messages = run(ranks, config, run_dir)
    for step in (4, 8):
        commit_step(config, run_dir, messages, step)
    return run_dir


def assert_same_model(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """float64, so that no stop decision flips; 1e-9 as in the parity of runs with all positions."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().amax()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9 * scale, msg=name)


@pytest.mark.parametrize(
    ("world_size", "cached", "exchange"),
    [(2, True, "every_iteration"), (3, False, "every_iteration"), (3, True, "gather_state")],
)
def test_all_ranks_draw_the_same_positions(
    ranks: Any, with_positions: RunMaker, alone: Path, tmp_path: Path, world_size: int, cached: bool, exchange: str
) -> None:
    run(ranks, with_positions(world_size, exchange=exchange, cache_features=cached), tmp_path / "run")
    assert_same_model(exported(tmp_path / "run"), exported(alone))


@pytest.mark.parametrize("step", [4, 8])
def test_resuming_repeats_every_bit(
    ranks: Any, with_positions: RunMaker, alone: Path, tmp_path: Path, step: int
) -> None:
    """A resumed run draws for its next update what the uninterrupted run drew."""
    run(ranks, with_positions(1), tmp_path / "run", folder_of(alone, step))
    expected = exported(alone)
    for name, tensor in exported(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name


def test_all_positions_drawn_are_all_positions(
    ranks: Any, with_positions: RunMaker, alone: Path, tmp_path: Path
) -> None:
    """36 and 9 positions, the whole maps, on the way of drawn ones; and fewer of them do teach another model."""
    run(ranks, with_positions(1, (36, 9)), tmp_path / "drawn")
    run(ranks, with_positions(1, (None, None)), tmp_path / "whole")
    assert_same_model(exported(tmp_path / "drawn"), exported(tmp_path / "whole"))
    name = "layers.0.feedforward"
    assert (exported(alone)[name] - exported(tmp_path / "whole")[name]).norm() > 1e-3


class Spy(LayerInputs):
    """Notes what every update learns from; the same images give the same patches before it, and others after it."""

    batches: ClassVar[list[Patches]] = []
    latest: tuple[Staged, Tensor] | None = None

    def prepare(self, batch: Staged) -> Patches:
        patches = super().prepare(batch)
        assert torch.equal(matrix_of(super().prepare(batch)), matrix_of(patches))
        if self.latest is not None:
            before, matrix = self.latest
            assert not torch.equal(matrix_of(super().prepare(before)), matrix)
        self.latest = batch, matrix_of(patches)
        self.batches.append(patches)
        return patches


def matrix_of(patches: Patches) -> Tensor:
    assert patches.matrix is not None
    return patches.matrix


def test_every_update_draws_anew(with_positions: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 updates of 20 images in layer 0, 2 epochs of 4 updates in layer 1."""
    monkeypatch.setattr("simmatch.greedy.LayerInputs", Spy)
    monkeypatch.setattr(Spy, "batches", [])
    train(IDENTITY, with_positions(1), tmp_path)
    for number, patches in enumerate(Spy.batches):
        index = int(number >= 5)
        assert (patches.batch_size, patches.positions) == (20, (7, 4)[index])
        assert matrix_of(patches).shape == ((140, 9), (80, 90))[index]
    assert len(Spy.batches) == 13


def test_positions_that_a_map_lacks_stop_training(with_positions: RunMaker, tmp_path: Path) -> None:
    training = Training(Assignment(with_positions(1, (37, None)), tmp_path, 0), Mesh(), Outbox(), torch.device("cpu"))
    with pytest.raises(TrainingFault, match="positions: expected at most 36, the map of 6 × 6 activities, got 37"):
        training.run()
