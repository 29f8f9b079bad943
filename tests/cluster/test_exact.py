"""Whole runs with `reduce: exact` over gloo: one file of weights for any number of ranks, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints.manifest import folder_of, read_manifest, write_manifest
from cluster.config import RunConfig
from cluster.messages import NodeWarning, ReadoutScored
from simmatch.config import ConfigError, parse
from tests.cluster.test_checkpoint import commit_all, run
from tests.cluster.test_gather_state import with_dynamics
from tests.exchanges import of_type

ConfigMaker = Callable[..., RunConfig]


def exact(digits_config: ConfigMaker, channel: int, **changes: Any) -> RunConfig:
    config = digits_config(channel, reduce="exact", probe={"readout": "ridge"}, **changes)
    return with_dynamics(config, exchange="gather_state")


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def single(
    digits_config: ConfigMaker, ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[Any]]]:
    """The run on one rank, its checkpoints committed."""
    run_dir, config = tmp_path_factory.mktemp("single") / "run", exact(digits_config, 1)
    messages = run(ranks, config, run_dir)
    commit_all(config, run_dir, messages)
    return run_dir, messages


def test_three_ranks_export_the_bytes_of_one(
    single: Any, ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    messages = run(ranks, exact(digits_config, 3), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(single[0])
    assert of_type(messages[0], ReadoutScored) == of_type(single[1][0], ReadoutScored)


def test_a_checkpoint_of_one_rank_continues_on_two(
    single: Any, ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """From the middle of the supervised layer. What the last bits depend on is recorded, and nothing has changed."""
    folder = folder_of(single[0], 16)
    assert all(shard.arithmetic is not None for shard in read_manifest(folder).shards)
    messages = run(ranks, exact(digits_config, 2), tmp_path / "run", folder)
    assert weights(tmp_path / "run") == weights(single[0])
    assert not of_type(messages[0], NodeWarning)


def test_a_checkpoint_of_another_processor_is_told(
    single: Any, ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """Not refused."""
    folder = folder_of(single[0], 16)
    manifest = read_manifest(folder)
    shards = [shard.model_copy(update={"arithmetic": "an abacus"}) for shard in manifest.shards]
    write_manifest(folder, manifest.model_copy(update={"shards": shards}))
    messages = run(ranks, exact(digits_config, 1), tmp_path / "run", folder)
    write_manifest(folder, manifest)
    (warning,) = of_type(messages[0], NodeWarning)
    assert "computed by an abacus, not by" in warning.text


@pytest.mark.parametrize("mode", ["every_iteration", "block"])
def test_other_modes_are_refused(mode: str, digits_config: ConfigMaker) -> None:
    config = with_dynamics(digits_config(1), exchange=mode).model_dump(mode="json") | {"reduce": "exact"}
    expected = (
        f"reduce: expected fast with model.layers.0.dynamics.exchange: {mode}, got exact, which needs gather_state"
    )
    with pytest.raises(ConfigError, match=expected):
        parse(RunConfig, config).check_mesh()
