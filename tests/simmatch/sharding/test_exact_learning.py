"""`reduce: exact`: weights with the same bits at any number of owners and replicas; faults that all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import ConfigError, DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement, measure
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import meshes, results, run_meshes

CHANNELS, CLASSES = 10, 10  # on 3 owners 4, 3, 3
UPDATES, DIES = 8, 2
LAYOUTS = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2)]
"""Replicas × owners."""

STATE = ("feedforward", "lateral", "label", "silent", "perron", "class_frequency", "revived")

KINDS: dict[str, dict[str, Any]] = {
    "conv": {"kernel_size": 4, "normalize": "contrast", "padding": 1},
    "lowered": {"kernel_size": 2, "normalize": "contrast", "stride": 2},  # P ≤ K: patches are written out
    "supervised": {
        "kernel_size": 3,
        "normalize": "contrast",
        "num_classes": CLASSES,
        "label_gain": 0.5,
        "whiten": True,
    },
    "drawn": {"kernel_size": 3, "normalize": "contrast", "num_classes": CLASSES, "label_gain": 0.5, "whiten": True},
    "dense": {"kernel_size": 8, "num_classes": CLASSES, "label_gain": 0.5, "whiten": True},
}
SOLVERS: dict[str, dict[str, Any]] = {
    "by column": {"tolerance": 1e-3},
    "by tile": {"solver": "accelerated", "tolerance": 1e-3, "max_iterations": 60},
}


def make_layer(mesh: Mesh, kind: str, solver: str, dtype: torch.dtype, reduce: Any = "exact") -> Any:
    rows = split_rows(CHANNELS, mesh.owners.world_size)[mesh.owners.rank]
    dynamics = DynamicsConfig(exchange="gather_state", **SOLVERS[solver])
    plasticity = PlasticityConfig(dead_after=3, lr=0.2, lr_decay_steps=20)
    return SimilarityMatchingConv2d(
        1,
        CHANNELS,
        **KINDS[kind],
        dynamics=dynamics,
        plasticity=plasticity,
        rows=rows,
        mesh=mesh,
        dtype=dtype,
        reduce=reduce,
    )


def updates_of(
    digits: Dataset, kind: str, solver: str, dtype: torch.dtype, *, reduce: Any = "exact"
) -> Callable[[Mesh], tuple[Any, list[Measurement]]]:
    """A program for one rank: it prepares only its part of every batch; the last batches are small ones."""
    images = to_unit(digits.train_images, dtype)
    labels = digits.train_labels if KINDS[kind].get("num_classes") else None

    def program(mesh: Mesh) -> tuple[Any, list[Measurement]]:
        layer = make_layer(mesh, kind, solver, dtype, reduce)
        layer.calibrate(images[:200])
        records = []
        for update in range(UPDATES):
            if update == DIES and layer.rows.start <= 6 < layer.rows.stop:
                layer.feedforward[6 - layer.rows.start] = 0.0
                layer.label[6 - layer.rows.start] = 0.0
            size = {UPDATES - 2: 37, UPDATES - 1: 1}.get(update, 90)
            chosen = slice(update * 100, update * 100 + size)
            x, z = images[chosen], None if labels is None else labels[chosen]
            positions = 5 if kind == "drawn" else None
            columns = positions or layer.patch.map_size((8, 8))[0] ** 2
            part = layer.sharing.part(len(x), columns)
            patches = layer.prepare(x[part.images], positions, part=part)
            records.append(measure(layer, patches, layer.partial_fit(patches, z), z, columns=500))
        return layer, records

    return program


def state_of(layers: list[Any], owners: int) -> dict[str, Tensor]:
    """The state of a whole layer, after a check that the replicas agree."""
    whole = {}
    for name in STATE:
        parts = [layer.get_buffer(name) for layer in layers]
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank % owners]), name
        sharded = name in ("feedforward", "lateral", "label", "silent")
        whole[name] = torch.cat(parts[:owners]) if sharded else parts[0]
    return whole | {"bound": torch.tensor([layers[0].bound.value])}


@pytest.mark.parametrize(
    ("kind", "solver", "dtype"),
    [
        *((kind, "by column", torch.float32) for kind in KINDS),
        ("lowered", "by tile", torch.float32),
        ("supervised", "by tile", torch.float32),
        ("dense", "by tile", torch.float32),
        ("supervised", "by column", torch.float64),
    ],
)
def test_weights_have_the_same_bits_at_any_layout(kind: str, solver: str, dtype: torch.dtype, digits: Dataset) -> None:
    """Nine channels learn, one dies and is revived; float sums do differ in some layout (the next test)."""
    program = updates_of(digits, kind, solver, dtype)
    ((single, records),) = results(run_meshes(meshes(), program))
    expected = state_of([single], 1)
    assert int(single.revived) >= 1
    layouts = LAYOUTS if (kind, solver) in (("conv", "by column"), ("supervised", "by tile")) else LAYOUTS[1::4]
    for replicas, owners in layouts:
        outcomes = results(run_meshes(meshes(replicas=replicas, owners=owners), program))
        state = state_of([layer for layer, _ in outcomes], owners)
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), (name, replicas, owners)
        for _, theirs in outcomes:
            assert [each.num_iters for each in theirs] == [each.num_iters for each in records]
            assert [each.objective for each in theirs] == pytest.approx([each.objective for each in records], rel=1e-5)


def test_sums_of_floats_differ_and_agree_to_rounding(digits: Dataset) -> None:
    """What the exact sums are for, and how little they change: rounding of 12 updates in float32."""
    fast, exact = (
        updates_of(digits, "supervised", "by column", torch.float32, reduce=name) for name in ("fast", "exact")
    )
    states = {}
    for name, program, owners in (("fast", fast, 1), ("fast on 3", fast, 3), ("exact", exact, 1)):
        layers = [layer for layer, _ in results(run_meshes(meshes(owners=owners), program))]
        states[name] = state_of(layers, owners)["lateral"]
    assert not torch.equal(states["fast"], states["fast on 3"])
    torch.testing.assert_close(states["fast"], states["exact"], rtol=0.05, atol=0.01)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replicas", "owners"), [(1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("fault", ["infinite pixels", "magnitudes", "statistics", "too large"])
def test_all_ranks_raise_a_fault_and_nothing_has_changed(
    fault: str, recorded: bool, replicas: int, owners: int, digits: Dataset
) -> None:
    """Of the last rank: pixels that are not finite; an exception before the scales are exchanged, or after; and sums
    that float32 cannot hold, which all ranks find by the bound alone. Then the layer learns on as if nothing had been.
    """
    images = to_unit(digits.train_images[:90], torch.float32)
    last = replicas * owners - 1

    def program(mesh: Mesh) -> tuple[str, bool, bool]:
        layer = make_layer(mesh, "lowered", "by column", torch.float32)
        layer.partial_fit(images)
        before = {name: layer.get_buffer(name).clone() for name in STATE}
        x, mine = images, mesh.columns.rank == last
        if fault == "infinite pixels":
            x = images.clone()
            x[-1, 0, 3, 3] = torch.inf
        elif fault == "too large":
            x = images * 1e25
        elif mine:
            name = "_solve_blocks" if fault == "magnitudes" else "_fixed_sums"
            setattr(layer.sharing, name, _broken)

        def learn() -> None:
            layer.partial_fit(layer.prepare(x), recorded=recorded)
            layer.raise_faults()

        with pytest.raises(SharedFault) as raised:
            learn()
        vars(layer.sharing).pop("_solve_blocks", None)
        vars(layer.sharing).pop("_fixed_sums", None)
        unchanged = all(torch.equal(layer.get_buffer(name), value) for name, value in before.items())
        layer.partial_fit(images)
        return str(raised.value), unchanged, int(layer.updates) == 2

    outcomes = results(run_meshes(meshes(replicas=replicas, owners=owners), program))
    messages = {message for message, _, _ in outcomes}
    assert all(unchanged and learns for _, unchanged, learns in outcomes)
    assert len(messages) == 1
    expected = {"infinite pixels": f"on rank {last}", "too large": "non-finite"}.get(fault, f"exception on rank {last}")
    assert expected in messages.pop()


def _broken(*arguments: Any, **options: Any) -> Any:
    raise OSError("no memory")


@pytest.mark.parametrize("mode", ["every_iteration", "block"])
def test_modes_whose_shapes_depend_on_the_ranks_are_refused(mode: str) -> None:
    expected = f"reduce: expected fast with dynamics.exchange: {mode}, got exact, which needs gather_state"
    with pytest.raises(ConfigError, match=expected):
        SimilarityMatchingConv2d(1, 4, 3, dynamics=DynamicsConfig(exchange=mode), reduce="exact")  # type: ignore[arg-type]
