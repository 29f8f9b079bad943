"""Coordinate descent: what it promises beyond the solution, which test_dynamics.py holds against NNLS."""

from __future__ import annotations

import copy
import math
import time
import warnings

import pytest
import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import certify_afresh
from simmatch.solvers.coordinate import CHUNK, LANES, CoordinateDescent
from simmatch.solvers.dynamics import Dynamics
from simmatch.solvers.quadratic import ConvergenceWarning, solve
from tests.exchanges import results, run_owners
from tests.reference import nnls_columns, random_drive, random_lateral, relative_residual

BY_COLUMN = DynamicsConfig(solver="coordinate_descent", tolerance=1e-5, ridge=0)


def problem(size: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    lateral = random_lateral(size, seed, condition=300.0, largest=4.0)
    return random_drive(size, columns, seed + 1).to(dtype), lateral.to(dtype)


def descend(
    columns: Tensor, lateral: Tensor, *, tolerance: float = 1e-5, limit: int = 200
) -> tuple[int, Tensor, Tensor]:
    """(iterations, residual, y) of a fresh solver from zero."""
    solver = CoordinateDescent()
    y, iterations, residual = solver.solve(columns, lateral, ridge=0.0, tolerance=tolerance, max_iterations=limit)
    return iterations, residual, y


@pytest.mark.parametrize("size", [1, LANES - 1, LANES, LANES + 1, 3 * LANES])
def test_padding_of_the_channels_leaves_no_trace(size: int) -> None:
    columns, lateral = problem(size, CHUNK + 3, torch.float64)
    _, residual, y = descend(columns, lateral, tolerance=1e-13)
    expected = nnls_columns(columns, lateral)
    # |Δy| ≤ √K · residual · max|d| / λmin, and |y*| ≳ max|d| / λmax: √48 · 1e-13 · 300
    assert (y - expected).norm() <= 1e-9 * expected.norm()
    assert residual.amax() <= 1e-13


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_code_depends_on_nothing_but_its_column_bit_by_bit(threads: int) -> None:
    """Whatever the batch mates, the place in the batch and the threads: there is no GEMM whose kernel could change."""
    columns, lateral = problem(40, 700)
    _, _, expected = descend(columns, lateral)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, _, shuffled = descend(columns[:, order], lateral)
        _, _, few = descend(columns[:, 5:12].contiguous(), lateral)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shuffled, expected[:, order])
    assert torch.equal(few, expected[:, 5:12])


def test_buffers_are_reused_without_a_trace() -> None:
    """After another problem of the same size, of another size and of another dtype."""
    columns, lateral = problem(20, 50)
    other, harder = problem(20, 50, seed=7)
    _, _, expected = descend(columns, lateral)
    solver = CoordinateDescent()
    for drive, matrix in ((other, harder), problem(33, 5), problem(20, 5, torch.float64), (columns, lateral)):
        y, *_ = solver.solve(drive, matrix, ridge=0.0, tolerance=1e-5, max_iterations=200)
    assert torch.equal(y, expected)


def test_a_layer_that_has_learnt_can_be_copied() -> None:
    """Threads and buffers are not part of what it knows."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = SimilarityMatchingConv2d(1, 6, 3)
        layer.partial_fit(images)
        other = copy.deepcopy(layer)
        layer.partial_fit(images)
        other.partial_fit(images)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(other.lateral, layer.lateral)
    assert torch.equal(other.solve(images).y, layer.solve(images).y)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_the_residual_is_that_of_the_returned_activities(tolerance: float) -> None:
    columns, lateral = problem(50, 200)
    _, residual, y = descend(columns, lateral, tolerance=tolerance)
    assert residual.amax() <= tolerance
    # float32 rounding of M y, some 20 active terms of size max|d|
    torch.testing.assert_close(residual.double(), relative_residual(columns, lateral, y), rtol=0, atol=1e-5)
    assert (y >= 0).all()


def test_a_tighter_tolerance_never_raises_the_energy() -> None:
    """Moves and faces only descend, and the tolerance only determines where on the same path to stop."""
    columns, lateral = problem(30, 40, torch.float64)
    previous = torch.zeros(40, dtype=torch.float64)
    for tolerance in (0.5, 0.2, 0.1, 1e-2, 1e-3, 1e-6, 1e-10):
        _, _, y = descend(columns, lateral, tolerance=tolerance)
        energy = (y * (0.5 * lateral @ y - columns)).sum(dim=0)
        assert (energy <= previous + 1e-12).all()  # energies near 1, in float64
        previous = energy


def test_a_limit_on_moves_ends_the_search() -> None:
    lateral, columns = random_lateral(8, 3, condition=1e4, largest=50.0), random_drive(8, 40, 4)
    iterations, residual, _ = descend(columns, lateral, tolerance=1e-6, limit=1)
    assert iterations == 1
    assert residual.amax() > 1e-6
    with pytest.warns(ConvergenceWarning, match=r"residual of .* above the tolerance 1\.00e-06; raise max_iterations"):
        solve(columns, lateral, BY_COLUMN.model_copy(update={"tolerance": 1e-6, "max_iterations": 1}))


def test_what_the_dtype_cannot_reach_ends_soon_with_the_reached_residual() -> None:
    """float32 cannot reach 1e-12, and the search ends without using up the iterations it was given."""
    columns, lateral = problem(40, 100)
    iterations, residual, y = descend(columns, lateral, tolerance=1e-12, limit=1_000_000)
    assert iterations < 50
    assert 1e-12 < residual.amax() < 1e-5
    assert relative_residual(columns, lateral, y).amax() < 1e-5
    with pytest.warns(ConvergenceWarning, match=r"reached a residual of \d\.\d+e-0[678]"):
        solve(columns, lateral, BY_COLUMN.model_copy(update={"tolerance": 1e-12}))


def test_channels_that_are_alike_share_a_singular_face() -> None:
    """M_SS has no Cholesky factor where two channels are equal: their sum is determined, and y stays finite."""
    columns, lateral = problem(10, 30, torch.float64)
    twice = torch.cat([torch.arange(10), torch.arange(10)])
    _, residual, y = descend(columns[twice], lateral[twice][:, twice], tolerance=1e-10, limit=2_000)
    assert residual.amax() <= 1e-10
    expected = nnls_columns(columns, lateral)
    assert (y[:10] + y[10:] - expected).norm() <= 1e-6 * expected.norm()  # 1e-10 times the condition of 300, amply


def test_a_dead_row_stays_silent_and_the_others_are_solved() -> None:
    columns, lateral = problem(6, 8, torch.float64)
    expected = nnls_columns(columns[:5], lateral[:5, :5])
    lateral[5] = lateral[:, 5] = 0.0
    columns[5] = 1.0  # driven, with nothing to hold it: no minimum
    _, residual, y = descend(columns, lateral, tolerance=1e-10)
    assert (y[5] == 0).all()
    assert (residual > 0).all()
    assert (y[:5] - expected).norm() <= 1e-6 * expected.norm()


def test_work_is_counted_in_moves_and_falls_from_a_good_start() -> None:
    """Counts, not clocks: K moves are an iteration; from the solution none are needed, and from nearby fewer."""
    lateral, columns = random_lateral(12, 3, condition=1e3, largest=50.0, signed=True), random_drive(12, 200, 4)
    config = BY_COLUMN.model_copy(update={"tolerance": 1e-8})
    cold = solve(columns, lateral, config)
    gradient = solve(columns, lateral, DynamicsConfig(solver="accelerated", tolerance=1e-3, max_iterations=1000))
    assert 3 <= cold.num_iters <= 0.1 * gradient.num_iters  # an iteration of either costs one product with M
    assert solve(columns, lateral, BY_COLUMN.model_copy(update={"tolerance": 2e-8}), start=cold.y).num_iters == 0
    near = solve(columns, 0.999 * lateral, config, start=cold.y)
    assert near.num_iters < cold.num_iters
    assert near.residual.amax() <= 1e-8


@pytest.mark.parametrize("solver", ["coordinate_descent", "accelerated"])
def test_a_start_changes_the_way_and_not_the_end(solver: str) -> None:
    columns, lateral = problem(12, 20, torch.float64)
    config = DynamicsConfig(solver=solver, tolerance=1e-12, max_iterations=20_000, ridge=0)
    start = torch.rand(12, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = nnls_columns(columns, lateral)
    assert (solve(columns, lateral, config, start=start).y - expected).norm() <= 1e-8 * expected.norm()
    assert solve(columns, lateral, config, start=expected).num_iters <= 9  # two checks at most


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.zeros(4, 3), r"start: expected \[4, 2\] of torch.float32, got \[4, 3\]"),
        (torch.zeros(4, 2).double(), r"got \[4, 2\] of torch.float64"),
        (torch.full((4, 2), -1.0), "start: expected finite, nonnegative values"),
        (torch.full((4, 2), math.nan), "start: expected finite, nonnegative values"),
    ],
)
def test_a_bad_start_is_named(start: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(torch.ones(4, 2), torch.eye(4), start=start)


def test_auto_takes_columns_where_nothing_is_exchanged() -> None:
    """By configuration, never by the number of shards: one shard and several must take the same solver."""
    auto = DynamicsConfig()
    assert auto.solver_on("cpu", alone=True) == "coordinate_descent"
    assert auto.solver_on("cpu", alone=False) == auto.solver_on("cuda", alone=True) == "accelerated"
    assert auto.encoding().solver == "accelerated"
    assert DynamicsConfig(tolerance=0).solver_on("cpu", alone=True) == "accelerated"  # a number of iterations
    columns, lateral = problem(9, 30, torch.float64)
    bound = certify_afresh(lateral, Rows.all(9), ridge=0)
    for alone, solver in ((False, "accelerated"), (True, "coordinate_descent")):
        solution = Dynamics(auto, Rows.all(9), alone=alone).solve(columns, lateral, bound)
        named = Dynamics(DynamicsConfig(solver=solver), Rows.all(9)).solve(columns, lateral, bound)
        assert torch.equal(solution.y, named.y)


def test_shards_are_refused() -> None:
    rows = split_rows(8, 2)

    def owner(exchange):  # type: ignore[no-untyped-def]
        return Dynamics(BY_COLUMN, rows[exchange.rank], exchange)

    for error in run_owners(2, owner):
        assert isinstance(error, ValueError)
        assert "solver: expected accelerated with exchange: every_iteration and 2 shards, got coord" in str(error)
    assert len(results(run_owners(2, lambda exchange: exchange.rank))) == 2


@pytest.mark.parametrize("where", ["drive", "lateral"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(where: str, value: float) -> None:
    columns, lateral = problem(6, 4)
    bound = certify_afresh(lateral, Rows.all(6), ridge=0)
    (columns if where == "drive" else lateral)[2, 1] = value
    with pytest.raises(SharedFault, match="non-finite values in the drive or the lateral weights"):
        Dynamics(BY_COLUMN, Rows.all(6)).solve(columns, lateral, bound)


def test_indefinite_lateral_ends() -> None:
    """`solve` refuses it; the layer's path, which trusts its own M, must still come to an end, and finite."""
    lateral = torch.eye(4) - 0.9 * torch.ones(4, 4)
    lateral.diagonal().clamp_(min=0.1)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, residual, y = descend(torch.ones(4, 3), lateral, limit=50)
    assert time.monotonic() - began < 30.0
    assert not (residual <= 1e-5).any() or y.isfinite().all()
