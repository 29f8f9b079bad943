"""Profiles of ranks that exchange: their files, what they report, and that nothing else changes.

Oracles: the same run without a profile, bit by bit; the exchanges that each rank counts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import RunConfig
from cluster.messages import LayerProfiled, Outbox
from cluster.profiles import FOLDER
from cluster.summary import RunRecord
from cluster.training import Assignment, Training
from simmatch.config import parse
from simmatch.parts import PREFIX, PartTime
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh
from tests.cluster.actors import model
from tests.exchanges import results

UPDATES = 4
ConfigMaker = Callable[..., RunConfig]


def train(exchange: Exchange, config: RunConfig, run_dir: Path, updates: int) -> list[Any]:
    """What a rank reports; of the updates that it profiled also the exchanges that it counted."""
    outbox, counted = Outbox(), {}

    class Counting(Training):
        def updated(self, update: Any) -> None:
            counted[update.index, update.number] = exchange.num_exchanges
            super().updated(update)

    assignment = Assignment(config, run_dir, exchange.rank, profile=updates)
    Counting(assignment, Mesh.of_owners(exchange), outbox, torch.device("cpu")).run()
    profiles = [message for message in outbox.messages if isinstance(message, LayerProfiled)]
    ends = [(one.layer, one.first - 1, one.first + one.updates - 1) for one in profiles]
    return [profiles, [counted[layer, last] - counted[layer, before] for layer, before, last in ends]]


def with_exchange(config: RunConfig, mode: str) -> RunConfig:
    values = config.model_dump(mode="json")
    for layer in values["model"]["layers"]:
        layer["dynamics"] |= {"exchange": mode}
    return parse(RunConfig, values)


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_two_ranks(ranks: Any, digits_config: ConfigMaker, tmp_path: Path, mode: str) -> None:
    config = with_exchange(digits_config(2, log_every=100), mode)  # nothing is measured among the profiled updates
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    results(ranks(train, 2, config, plain, 0))
    assert not (plain / FOLDER).exists()
    told = results(ranks(train, 2, config, profiled, UPDATES))
    assert model(profiled).read_bytes() == model(plain).read_bytes()
    files = {f"layer-{layer}-rank-{rank}.json.gz" for layer in range(2) for rank in range(2)}
    assert {path.name for path in (profiled / FOLDER).iterdir()} == files
    for rank, (profiles, counts) in enumerate(told):
        assert [(one.layer, one.first, one.updates, one.problem) for one in profiles] == [(0, 4, 4, ""), (1, 4, 4, "")]
        for one, exchanges in zip(profiles, counts, strict=True):
            assert one.file == f"layer-{one.layer}-rank-{rank}.json.gz"
            assert one.parts["dynamics"].count == UPDATES
            assert one.parts["waiting"].count == exchanges > UPDATES
            trace = json.loads(gzip.decompress((profiled / FOLDER / one.file).read_bytes()))
            assert sum(event.get("name") == f"{PREFIX}update" for event in trace["traceEvents"]) == UPDATES


def test_a_trace_that_cannot_be_written_costs_nothing_else(
    ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    ((profiles, _),) = results(ranks(train, 1, digits_config(1), tmp_path, UPDATES))
    assert model(tmp_path).exists()
    for one in profiles:
        assert one.problem.startswith("the trace is not written: ")
        assert one.problem.endswith(f"File exists: '{tmp_path / FOLDER}'")
        assert (one.file, one.updates) == ("", UPDATES)
        assert one.parts["dynamics"].host_s > 0  # the table is made all the same


def profile(layer: int = 0, first: int = 4, problem: str = "") -> LayerProfiled:
    return LayerProfiled(layer, first, UPDATES, {"rest": PartTime(1.0, 0.0, UPDATES)}, [], "trace", problem)


def test_a_problem_is_told_once() -> None:
    record = RunRecord()
    assert record.add_profile(0, profile()) is None
    assert record.add_profile(1, profile(problem="disk full")) == "profile of layer 0, rank 1: disk full"
    assert record.add_profile(2, profile(problem="disk full")) is None
    assert sorted(record.profiles[0]) == [0, 1, 2]


def test_the_profile_of_another_group_replaces_those_before() -> None:
    """A table shows the same updates of all ranks; the new group may have fewer."""
    record = RunRecord()
    for rank in range(3):
        record.add_profile(rank, profile(first=4))
    record.add_profile(0, profile(layer=1))
    record.add_profile(1, profile(first=10))
    record.add_profile(0, profile(first=10))
    assert sorted(record.profiles[0]) == [0, 1]
    assert sorted(record.profiles[1]) == [0]
