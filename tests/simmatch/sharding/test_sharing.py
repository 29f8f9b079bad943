"""Columns split over the owners of rows (`exchange: gather_state`): one result, few exchanges, faults known to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement, measure
from simmatch.sharding import sharing
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from tests.exchanges import ThreadExchange, results, run_owners
from tests.simmatch.sharding.injected import FUNCTIONS, InjectedError, damage, fail
from tests.simmatch.sharding.layers import CHANNELS, CLASSES, layer_of

UPDATES = 25
WEIGHTS = ("feedforward", "lateral", "label")
FIXED = {"solver": "accelerated", "tolerance": 0.0, "max_iterations": 12}


def make_layer(exchange: ThreadExchange, mode: str, kind: str, dynamics: dict[str, Any]) -> SimilarityMatchingConv2d:
    rates = PlasticityConfig(dead_after=5)
    return layer_of(Mesh.of_owners(exchange), mode, kind, {"tile_columns": 64, **dynamics}, rates)


def batches(digits: Dataset, kind: str, size: int) -> list[tuple[Tensor, Tensor | None]]:
    """Images of 7 × 6 pixels, 6 × 6 for the dense layer, with labels where the layer has a use for them."""
    images = to_unit(digits.train_images, torch.float64)[:, :, : 6 if kind == "dense" else 7, :6]
    labels = digits.train_labels
    starts = [update * 11 for update in range(UPDATES)]
    return [
        (images[start : start + size], None if kind == "conv" else labels[start : start + size]) for start in starts
    ]


class Learnt:
    """What an owner ends with."""

    def __init__(self, layer: SimilarityMatchingConv2d, records: list[Measurement], codes: list[Tensor]) -> None:
        self.layer, self.records, self.codes = layer, records, codes


def learn(
    digits: Dataset, mode: str, kind: str, size: int, dynamics: dict[str, Any]
) -> Callable[[ThreadExchange], Learnt]:
    """A program for one owner: 25 updates, with a channel that dies and is revived on the way; then it looks back."""
    work = batches(digits, kind, size)
    sample = to_unit(digits.train_images[:200], torch.float64)[:, :, : 6 if kind == "dense" else 7, :6]

    def program(exchange: ThreadExchange) -> Learnt:
        layer = make_layer(exchange, mode, kind, dynamics)
        layer.calibrate(sample)
        records = []
        for update, (images, labels) in enumerate(work):
            if update == 10 and layer.rows.start <= 6 < layer.rows.stop:
                layer.feedforward[6 - layer.rows.start] = 0.0
                layer.label[6 - layer.rows.start] = 0.0
            patches = layer.prepare(images)
            solution = layer.partial_fit(patches, labels)
            records.append(measure(layer, patches, solution, labels, columns=24))
        images, labels = work[0]
        return Learnt(layer, records, [layer.solve(images, labels).y, layer(images)])

    return program


def of_all(owners_learnt: list[Learnt], name: str) -> Tensor:
    return torch.cat([learnt.layer.get_buffer(name) for learnt in owners_learnt])


# -- one result --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [("conv", 1), ("conv", 5), ("supervised", 1), ("supervised", 2), ("dense", 2), ("dense", 5)],
)
def test_fixed_iterations_give_the_weights_of_one_owner(kind: str, size: int, digits: Dataset) -> None:
    """The same iterations on the same columns: only the order of sums differs, 1e-16 of values near 1 over 12
    iterations and 25 updates of a contracting rule. One image on 3 owners, and no column for the third (dense, 2),
    are among the cases. One owner does the same arithmetic in the same order as without the split: the same bits."""
    ((single),) = results(run_owners(1, learn(digits, "every_iteration", kind, size, FIXED)))
    assert single.layer.revived >= 1
    fresh = make_layer(single.layer.mesh.owners, "every_iteration", kind, FIXED)
    assert (single.layer.feedforward - fresh.feedforward).norm() > 0.1 * fresh.feedforward.norm()
    for owners in (1, 2, 3):
        owners_learnt = results(run_owners(owners, learn(digits, "gather_state", kind, size, FIXED)))
        for name in (*WEIGHTS, "silent"):
            allowed = 0.0 if owners == 1 else 1e-11
            torch.testing.assert_close(of_all(owners_learnt, name), single.layer.get_buffer(name), rtol=0, atol=allowed)
        for learnt in owners_learnt:
            assert learnt.layer.revived == single.layer.revived
            assert learnt.layer.bound.value == pytest.approx(single.layer.bound.value, rel=1e-11)
            for mine, theirs in zip(learnt.codes, single.codes, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
            for mine, theirs in zip(learnt.codes, owners_learnt[0].codes, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["conv", "supervised"])
def test_solving_tightly_gives_the_weights_of_another_solver(kind: str, digits: Dataset) -> None:
    """`auto` solves columns by coordinate descent where they are split, by gradients where rows are.

    Both reach a residual of 1e-9: ‖y − y*‖ ≤ 1e-9 · √K max|d| · (1 + ‖M D⁻¹‖) / λmin(M), with K = 10 below 1e-5 for
    the matrices here, whose condition the test looks at; the rule is a contracting average of such codes.
    """
    tight = {"tolerance": 1e-9, "max_iterations": 50_000, "ridge": 0.0}
    (single,) = results(run_owners(1, learn(digits, "every_iteration", kind, 5, tight)))
    eigenvalues = torch.linalg.eigvalsh(single.layer.lateral)
    assert eigenvalues[-1] < 1e3 * eigenvalues[0]
    for owners in (1, 3):
        owners_learnt = results(run_owners(owners, learn(digits, "gather_state", kind, 5, tight)))
        for name in WEIGHTS:
            torch.testing.assert_close(of_all(owners_learnt, name), single.layer.get_buffer(name), rtol=0, atol=1e-5)
        assert all(record.residual <= 1e-9 for record in owners_learnt[0].records)


def test_drawn_positions_are_learnt_from_alike(digits: Dataset) -> None:
    """Five positions of each image, so that a range of columns begins and ends inside an image's draw."""
    work = [
        (images, draw_positions(5, len(images), (4, 3), key))
        for key, (images, _) in enumerate(batches(digits, "conv", 3))
    ]

    def program(mode: str) -> Callable[[ThreadExchange], SimilarityMatchingConv2d]:
        def run(exchange: ThreadExchange) -> SimilarityMatchingConv2d:
            layer = make_layer(exchange, mode, "conv", FIXED)
            for images, positions in work:
                layer.partial_fit(layer.prepare(images, positions))
            return layer

        return run

    (single,) = results(run_owners(1, program("every_iteration")))
    for owners in (2, 3):
        shards = results(run_owners(owners, program("gather_state")))
        for name in ("feedforward", "lateral"):
            together = torch.cat([layer.get_buffer(name) for layer in shards])
            torch.testing.assert_close(together, single.get_buffer(name), rtol=0, atol=1e-11)


@pytest.mark.parametrize("late", [0, 2])
def test_a_slow_owner_changes_no_bit(late: int, digits: Dataset) -> None:
    program = learn(digits, "gather_state", "supervised", 5, {})
    prompt = results(run_owners(3, program))
    slow = results(run_owners(3, program, asynchronous=True, delays_s={late: 0.002}))
    for one, other in zip(prompt, slow, strict=True):
        assert one.records == other.records
        for name in WEIGHTS:
            assert torch.equal(one.layer.get_buffer(name), other.layer.get_buffer(name))


# -- what it costs, and what is recorded -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "patch"), [("conv", 9), ("supervised", 9)])
def test_an_update_moves_weights_and_statistics_once(kind: str, patch: int, digits: Dataset) -> None:
    """By hand, in float64: from each of two others come 4 padded rows of W, M and V with a mark, as many of the sums
    with theirs, and 3 + 1 values a row for the bound, with two marks. Iterations and columns do not enter."""
    label, classes = (CLASSES, CLASSES) if kind == "supervised" else (0, 0)
    weights = 4 * (patch + CHANNELS + label) + 1
    statistics = 4 * (patch + CHANNELS + classes) + 1
    expected = 2 * 8 * (weights + statistics + 4 * 4 + 2)

    def program(exchange: ThreadExchange) -> list[tuple[int, int]]:
        layer = make_layer(exchange, "gather_state", kind, FIXED)
        counted = []
        for size in (2, 2, 7, 1):
            images, labels = batches(digits, kind, size)[0]
            before = exchange.num_exchanges, exchange.bytes_exchanged
            patches = layer.prepare(images)
            if not layer.calibrated:
                layer.calibrate(images)
            solution = layer.partial_fit(patches, labels)
            counted.append((exchange.num_exchanges - before[0], exchange.bytes_exchanged - before[1]))
        before = exchange.num_exchanges, exchange.bytes_exchanged
        measure(layer, patches, solution, labels)
        counted.append((exchange.num_exchanges - before[0], exchange.bytes_exchanged - before[1]))
        return counted

    for counted in results(run_owners(3, program)):
        assert counted[1:4] == [(4, expected)] * 3  # the first has to find a bound from nothing
        assert counted[4] == (
            1,
            2 * 8 * ((CHANNELS + patch) * 4 + 4),
        )  # 12 columns, 4 an owner; three figures and a mark


@pytest.mark.parametrize("size", [1, 5])
def test_records_are_those_of_one_owner(size: int, digits: Dataset) -> None:
    """Also of batches with fewer images than owners; the objective uses the first 24 columns, two images."""
    (single,) = results(run_owners(1, learn(digits, "every_iteration", "supervised", size, FIXED)))
    last = single.records[-1]
    assert 0.0 < last.objective < 1.0
    assert 0.0 < last.active_fraction < 1.0
    for mode in ("every_iteration", "gather_state"):
        owners_learnt = results(run_owners(3, learn(digits, mode, "supervised", size, FIXED)))
        for learnt in owners_learnt:
            assert learnt.records == owners_learnt[0].records
            for mine, theirs in zip(learnt.records, single.records, strict=True):
                assert mine.num_iters == theirs.num_iters
                assert mine.objective == pytest.approx(theirs.objective, rel=1e-9)
                assert mine.residual == pytest.approx(theirs.residual, rel=1e-6)
                assert mine.active_fraction == pytest.approx(theirs.active_fraction, rel=1e-12)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guilty", "size"), [(0, 4), (2, 1)])
@pytest.mark.parametrize("kind", [*WEIGHTS, "images", "labels", "solver", "learn", *FUNCTIONS])
def test_a_fault_of_one_owner_is_raised_by_all(
    kind: str, guilty: int, size: int, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every phase of an update: no owner waits forever, and none learns from it."""
    work = batches(digits, "supervised", size)

    def program(exchange: ThreadExchange) -> Any:
        layer = make_layer(exchange, "gather_state", "supervised", {})
        layer.calibrate(work[0][0])
        layer.partial_fit(*work[0])
        images, labels = (part.clone() for part in work[1] if part is not None)
        if exchange.rank == guilty:
            damage(layer, kind, images, labels, monkeypatch)
        patches = layer.prepare(images)
        before = {name: layer.get_buffer(name).clone() for name in WEIGHTS}
        try:
            layer.partial_fit(patches, labels)
        except SharedFault as fault:
            unchanged = all(torch.equal(layer.get_buffer(name), before[name]) for name in WEIGHTS if name != kind)
            return fault, unchanged, exchange.num_exchanges
        return None

    outcomes = results(run_owners(3, program))
    exchanges = {count for _, _, count in outcomes}
    assert len(exchanges) == 1
    for rank, (fault, unchanged, _) in enumerate(outcomes):
        assert fault.ranks == [guilty]
        assert fault.kind.startswith("non-finite" if kind in (*WEIGHTS, "images") else "exception")
        assert unchanged
        if kind not in WEIGHTS:  # the reason is with the one who knows it
            assert (fault.__cause__ is not None) == (rank == guilty)


def test_a_fault_while_looking_is_raised_by_all(digits: Dataset) -> None:
    """`solve` and the label-free pass gather the solutions; an owner without one reports its fault."""
    images, _ = batches(digits, "conv", 4)[0]

    def program(exchange: ThreadExchange) -> list[list[int]]:
        layer = make_layer(exchange, "gather_state", "conv", {})
        if exchange.rank == 1:
            layer.sharing._solver.solve = fail
        ranks = []
        for look in (layer.solve, layer):
            with pytest.raises(SharedFault, match="exception on rank 1") as caught:
                look(images)
            ranks.append(caught.value.ranks)
        return ranks

    assert results(run_owners(3, program)) == [[[1], [1]]] * 3


def test_one_owner_raises_its_own_exception(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = batches(digits, "conv", 2)[0]
    layer = SimilarityMatchingConv2d(1, CHANNELS, 3, dynamics=DynamicsConfig(exchange="gather_state"))
    monkeypatch.setattr(sharing, "batch_statistics", fail)
    with pytest.raises(InjectedError, match="injected"):
        layer.partial_fit(images.float())
