"""Faults of a rank at every stage of a pipeline, and of every replica: each run is whole in the end.

A cell is `python -m jobs.pretrain` as in `test_fault_matrix`, over another mesh. A rank that is gone costs a group;
what would happen again ends the run with one line that names layer, step and rank, and the same command continues it.
In the end the weights are those of an undisturbed run, bit by bit. The cells of `FAST` run in `make test`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from cluster.storage import read
from tests.cluster.actors import model
from tests.cluster.test_axes import BEGINS, UPDATES, Run, together  # noqa: F401  a fixture
from tests.cluster.test_fault_matrix import Cell, assert_nothing_left, make_cell, model_of, ray, store  # noqa: F401
from tests.faults import FaultPlan, Kind

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MESHES: dict[str, dict[str, int]] = {"stages": {"layer": 2}, "replicas": {"data": 2}}
FAULTS: dict[Kind, str] = {
    "kill": "",
    "stop": "",
    "exception": "InjectedError: injected",
    "nan lateral": "non-finite ",
    "memory": "out of GPU memory",
}
"""Kind of a fault → part of the message with which the run ends; none where it goes on by itself."""

CELLS = [(mesh, kind, rank) for mesh in MESHES for kind in FAULTS for rank in (0, 1)]
FAST = [("stages", "kill", 1)]
STRIKES = 14
"""The update of the pass; the checkpoint of update 12 may not be committed by then."""
NEWEST = r"from step-000000(04|08|12)"


@pytest.fixture(scope="module")
def cell_of(make_cell: Callable[..., Cell], together: Callable[..., Any]) -> Callable[[str], Cell]:  # noqa: F811
    def make(mesh: str) -> Cell:
        model = together().model.model_dump(mode="json")
        return make_cell(mesh=MESHES[mesh], model=model, dtype="float64")

    return make


@pytest.fixture(scope="module")
def undisturbed(
    ranks: Any,
    together: Callable[..., Any],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], bytes]:
    """Weights that processes without Ray learn over a mesh, where nothing goes wrong."""
    known: dict[str, bytes] = {}

    def weights(mesh: str) -> bytes:
        if mesh not in known:
            run = Run(ranks, together(**MESHES[mesh]), tmp_path_factory.mktemp(mesh) / "run")
            known[mesh] = model(run.run_dir).read_bytes()
        return known[mesh]

    return weights


def cells(fast: bool) -> list[Any]:
    marks = [] if fast else [pytest.mark.fault]
    return [pytest.param(*cell, marks=marks, id=" ".join(map(str, cell))) for cell in CELLS if (cell in FAST) == fast]


@pytest.mark.parametrize(("mesh", "kind", "rank"), [*cells(fast=True), *cells(fast=False)])
def test_a_run_ends_as_if_nothing_had_happened(
    ray: Any,  # noqa: F811
    cell_of: Callable[[str], Cell],
    undisturbed: Callable[[str], bytes],
    mesh: str,
    kind: Kind,
    rank: int,
) -> None:
    layer = 2 if (mesh, rank) == ("stages", 1) else 0
    step = STRIKES - (BEGINS if layer == 2 else 0)
    cell = cell_of(mesh)
    cell.start(FaultPlan(rank=rank, layer=layer, step=step, kind=kind))
    status = cell.end()
    shown = "\n".join(cell.out)
    summary = json.loads(read(cell.run_dir / "summary.json"))
    assert "Traceback" not in shown or kind not in ("kill", "stop")
    if FAULTS[kind]:
        assert (status, summary["status"]) == (1, "FAILED"), shown
        assert FAULTS[kind] in summary["message"], shown
        assert f"layer {layer}" in summary["message"], shown
        assert f"rank {rank}" in summary["message"], shown
        cell.start(None)
        assert cell.end() == 0, cell.out
        assert re.search(NEWEST, cell.out[-1]), cell.out[-1]
        summary = json.loads(read(cell.run_dir / "summary.json"))
    else:
        assert f"rank {rank} (pid " in shown
        assert re.search(NEWEST, shown), shown
    assert (summary["status"], summary["steps"]) == ("FINISHED", UPDATES), shown
    assert summary["restarts"] == int(not FAULTS[kind])
    assert model_of(cell) == undisturbed(mesh), shown
    assert_nothing_left(ray, cell)
