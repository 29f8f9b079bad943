"""Replicas: parts of a batch learnt apart give the weights of one rank, and the same bits on every replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.labels import UNLABELLED
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement, measure
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import meshes, results, run_meshes
from tests.simmatch.sharding.injected import FUNCTIONS, WEIGHTS, damage
from tests.simmatch.sharding.layers import CHANNELS, CLASSES, layer_of

UPDATES = 13
STATE = (*WEIGHTS, "silent", "class_frequency", "perron", "updates", "revived")
MODES = ("every_iteration", "block", "gather_state")
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (2, 3))
"""Replicas and owners."""

FIXED = {"solver": "accelerated", "tolerance": 0.0, "max_iterations": 12}
TIGHT = {"tolerance": 1e-9, "max_iterations": 50_000, "ridge": 0.0}


def make_layer(mesh: Mesh, mode: str, kind: str, dynamics: dict[str, Any]) -> SimilarityMatchingConv2d:
    rates = PlasticityConfig(dead_after=5, lr=0.2, lr_decay_steps=20)
    return layer_of(mesh, mode, kind, {"tile_columns": 16, **dynamics}, rates)


def images_of(digits: Dataset, kind: str) -> Tensor:
    """7 × 6 pixels, 6 × 6 for the dense layer."""
    return to_unit(digits.train_images[:400], torch.float64)[:, :, : 6 if kind == "dense" else 7, :6]


def batches(digits: Dataset, kind: str) -> list[tuple[Tensor, Tensor | None]]:
    """Of five images and of fewer, down to one; some are unlabelled, and all of one batch."""
    images, labels = images_of(digits, kind), digits.train_labels[:400].clone()
    labels[::3] = UNLABELLED
    labels[33:44] = UNLABELLED
    sizes = [5, 5, 4, 1, 3, 2]
    work = []
    for update in range(UPDATES):
        chosen = slice(update * 11, update * 11 + sizes[update % len(sizes)])
        work.append((images[chosen], None if kind == "maps" else labels[chosen]))
    return work


def own_part(layer: SimilarityMatchingConv2d, images: Tensor, drawn: int | None) -> Any:
    """Patches of this rank's part of a batch, of nothing else."""
    positions = drawn or (1 if images.shape[2] == layer.patch.kernel_size else 12)
    part = layer.sharing.part(len(images), positions)
    return layer.prepare(images[part.images], drawn, part=part)


class Learnt:
    """What a rank ends with."""

    def __init__(self, mesh: Mesh, layer: SimilarityMatchingConv2d, records: list[Measurement]) -> None:
        self.replica, self.layer, self.records = mesh.replicas.rank, layer, records


def learn(
    digits: Dataset, mode: str, kind: str, dynamics: dict[str, Any], drawn: int | None = None, columns: int = 24
) -> Callable[[Mesh], Learnt]:
    """A program for one rank: 13 updates, with a channel that dies and is revived on the way."""
    work, sample = batches(digits, kind), images_of(digits, kind)

    def program(mesh: Mesh) -> Learnt:
        layer = make_layer(mesh, mode, kind, dynamics)
        layer.calibrate(sample)
        records = []
        for update, (images, labels) in enumerate(work):
            if update == 5 and layer.rows.start <= 6 < layer.rows.stop:
                layer.feedforward[6 - layer.rows.start] = 0.0
                layer.label[6 - layer.rows.start] = 0.0
            patches = own_part(layer, images, drawn)
            solution = layer.partial_fit(patches, labels)
            records.append(measure(layer, patches, solution, labels, columns=columns))
        return Learnt(mesh, layer, records)

    return program


def of_replica(learnt: list[Learnt], replica: int, name: str) -> Tensor:
    """A buffer of all owners of one replica, joined where its rows are split."""
    own = [each.layer.get_buffer(name) for each in learnt if each.replica == replica]
    return torch.cat(own) if name in (*WEIGHTS, "silent") else own[0]


def assert_equal_replicas(learnt: list[Learnt]) -> None:
    for each in learnt:
        assert each.records == learnt[0].records
        for name in STATE:
            assert torch.equal(of_replica(learnt, each.replica, name), of_replica(learnt, 0, name)), name


# -- one result --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "drawn", "replicas", "owners"),
    [
        *(("supervised", None, *shape) for shape in SHAPES),
        *((kind, drawn, *shape) for kind, drawn in (("maps", 5), ("dense", None)) for shape in ((2, 2), (3, 1))),
    ],
)
def test_replicas_give_the_weights_of_one(
    mode: str, kind: str, drawn: int | None, replicas: int, owners: int, digits: Dataset
) -> None:
    """The same iterations on the same columns: only the order of sums differs, 1e-16 of values near 1 over 12
    iterations and 13 updates of a contracting rule. One image on 3 replicas is among the batches. The iterates of
    `block` depend on the number of owners: they are compared with those of one replica."""
    program = learn(digits, mode, kind, FIXED, drawn)
    single = results(run_meshes(meshes(1, 1, owners if mode == "block" else 1), program))
    learnt = results(run_meshes(meshes(replicas, 1, owners), program))
    assert_equal_replicas(learnt)
    assert int(learnt[0].layer.revived) == int(single[0].layer.revived) >= 1
    for name in STATE:
        torch.testing.assert_close(of_replica(learnt, 0, name), of_replica(single, 0, name), rtol=0, atol=1e-11)
    for mine, theirs in zip(learnt[0].records, single[0].records, strict=True):
        assert mine.num_iters == theirs.num_iters
        assert mine.objective == pytest.approx(theirs.objective, rel=1e-9, abs=1e-12)
        assert mine.residual == pytest.approx(theirs.residual, rel=1e-6)
        assert mine.active_fraction == pytest.approx(theirs.active_fraction, rel=1e-12)


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_replicas_are_equal_after_many_updates(mode: str, digits: Dataset) -> None:
    """A hundred, in float32, with channels that die and are revived every fifth update."""
    images = to_unit(digits.train_images[:300], torch.float32)

    def program(mesh: Mesh) -> dict[str, Tensor]:
        rows = split_rows(CHANNELS, mesh.owners.world_size)[mesh.owners.rank]
        rates = PlasticityConfig(lr=0.3, dead_after=1)
        dynamics = DynamicsConfig(exchange=mode, max_iterations=30)
        layer = SimilarityMatchingConv2d(1, CHANNELS, 4, dynamics=dynamics, plasticity=rates, rows=rows, mesh=mesh)
        for update in range(100):
            if update % 5 == 0:
                layer.feedforward[0] = 0.0
            chosen = images[update * 2 : update * 2 + 1 + update % 4]
            part = layer.sharing.part(len(chosen), 3)
            layer.partial_fit(layer.prepare(chosen[part.images], 3, part=part))
        return {name: layer.get_buffer(name).clone() for name in STATE}

    first, second, third, fourth = results(run_meshes(meshes(2, 1, 2), program))
    assert int(first["revived"]) > 20
    for one, other in ((first, third), (second, fourth)):
        for name in STATE:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("replicas", "owners"), [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_replicas_add_their_sums_once_an_update(mode: str, replicas: int, owners: int, digits: Dataset) -> None:
    """By hand, in float64: on R replicas, 2 (R − 1) parts of the sums of 10 / G rows of W, M and V, rounded up; of the
    bound 4 values a row and 2 marks from every other rank. Columns and iterations do not enter."""
    patch, rows = 9, CHANNELS // owners
    sums = rows * (patch + CHANNELS + CLASSES)
    by_replicas = 2 * (replicas - 1) * -(-sums // replicas) * 8
    by_bound = (replicas * owners - 1) * (4 * rows + 2) * 8
    work = batches(digits, "supervised")

    def program(mesh: Mesh) -> None:
        layer = make_layer(mesh, mode, "supervised", FIXED)
        layer.calibrate(images_of(digits, "supervised"))
        layer.partial_fit(*work[0])
        for images, labels in work[1:4]:
            exchanges = (mesh.replicas, mesh.columns)
            before = [(exchange.num_exchanges, exchange.bytes_exchanged) for exchange in exchanges]
            layer.partial_fit(own_part(layer, images, None), labels)
            made = [
                (exchange.num_exchanges - count, exchange.bytes_exchanged - received)
                for exchange, (count, received) in zip(exchanges, before, strict=True)
            ]
            assert made == [(2, by_replicas), (2, by_bound)]

    results(run_meshes(meshes(replicas, 1, owners), program))


@pytest.mark.parametrize(("mode", "replicas", "owners"), [("block", 2, 2), ("gather_state", 2, 2)])
def test_solving_tightly_gives_the_weights_of_another_solver(
    mode: str, replicas: int, owners: int, digits: Dataset
) -> None:
    """As in `test_sharing`: codes of a residual of 1e-9 differ by less than 1e-5, and weights average them."""
    single = results(run_meshes(meshes(1, 1, 1), learn(digits, "every_iteration", "supervised", TIGHT)))
    learnt = results(run_meshes(meshes(replicas, 1, owners), learn(digits, mode, "supervised", TIGHT)))
    assert_equal_replicas(learnt)
    for name in WEIGHTS:
        torch.testing.assert_close(of_replica(learnt, 0, name), of_replica(single, 0, name), rtol=0, atol=1e-5)


def test_whole_batches_give_the_bits_of_parts(digits: Dataset) -> None:
    """`partial_fit` on every rank with the images of all."""
    images, labels = batches(digits, "supervised")[0]

    def program(mesh: Mesh) -> None:
        for mode in MODES:
            whole, parts = (make_layer(mesh, mode, "supervised", FIXED) for _ in range(2))
            for layer in (whole, parts):
                layer.calibrate(images)
            whole.partial_fit(images, labels)
            parts.partial_fit(own_part(parts, images, None), labels)
            for name in STATE:
                assert torch.equal(whole.get_buffer(name), parts.get_buffer(name))

    results(run_meshes(meshes(2, 1, 2), program))


@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_an_objective_of_many_columns_is_that_of_one_rank(mode: str, digits: Dataset) -> None:
    """Sums over columns are added, where these are more than the rows of a sum."""
    program = learn(digits, mode, "supervised", FIXED, columns=60)
    single = results(run_meshes(meshes(1, 1, 1), program))
    learnt = results(run_meshes(meshes(3, 1, 1), program))
    for mine, theirs in zip(learnt[0].records, single[0].records, strict=True):
        assert mine.objective == pytest.approx(theirs.objective, rel=1e-9)
    assert all(each.records == learnt[0].records for each in learnt)


@pytest.mark.parametrize("late", [0, 3])
def test_a_slow_rank_changes_no_bit(late: int, digits: Dataset) -> None:
    program = learn(digits, "every_iteration", "maps", {"max_iterations": 20})
    prompt = results(run_meshes(meshes(2, 1, 2), program))
    slow = results(run_meshes(meshes(2, 1, 2, asynchronous=True, delays_s={late: 0.0005}), program))
    for one, other in zip(prompt, slow, strict=True):
        assert one.records == other.records
        for name in STATE:
            assert torch.equal(one.layer.get_buffer(name), other.layer.get_buffer(name))


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [0, 3])
@pytest.mark.parametrize("kind", [*WEIGHTS, "images", "labels", "solver", "learn", *FUNCTIONS])
@pytest.mark.parametrize("mode", ["every_iteration", "gather_state"])
def test_a_fault_in_one_replica_is_raised_by_all(
    mode: str, kind: str, guilty: int, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas of two owners, at the same update, and none has learnt from it; then all learn on."""
    if (mode, kind) == ("every_iteration", "solver"):
        pytest.skip("an owner that leaves the dynamics is a lost peer")
    work = batches(digits, "supervised")

    def program(mesh: Mesh) -> Any:
        layer = make_layer(mesh, mode, "supervised", {})
        layer.calibrate(images_of(digits, "supervised"))
        layer.partial_fit(*work[0])
        images, labels = (part.clone() for part in work[1] if part is not None)
        if mesh.columns.rank == guilty:
            damage(layer, kind, images, labels, monkeypatch)
        patches = own_part(layer, images, None)
        before = {name: layer.get_buffer(name).clone() for name in STATE}
        try:
            layer.partial_fit(patches, labels)
        except SharedFault as fault:
            changed = [name for name in STATE if name != kind and not torch.equal(layer.get_buffer(name), before[name])]
            return fault, changed, mesh.columns.num_exchanges
        return None

    outcomes = results(run_meshes(meshes(2, 1, 2), program))
    assert len({count for _, _, count in outcomes}) == 1
    for rank, (fault, changed, _) in enumerate(outcomes):
        assert fault.ranks == [guilty]
        assert fault.kind.startswith("non-finite" if kind in (*WEIGHTS, "images") else "exception")
        assert changed == []
        if kind not in WEIGHTS:  # the reason is with the one who knows it
            assert (fault.__cause__ is not None) == (rank == guilty)
