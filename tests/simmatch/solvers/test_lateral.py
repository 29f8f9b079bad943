"""The certified bound against eigenvalues; and owners of channels, in threads, against a single owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import certify, certify_afresh, warm_up
from simmatch.solvers.dynamics import Dynamics, Solution
from tests.exchanges import ThreadExchange, held, results, run_owners
from tests.reference import random_drive, random_lateral, relative_residual

MATRICES = settings(derandomize=True, deadline=None, database=None, max_examples=40)
ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True])


def largest_eigenvalue(lateral: Tensor) -> float:
    return float(torch.linalg.eigvalsh(lateral.double())[-1])


# -- the bound ---------------------------------------------------------------------------------------------------------


@MATRICES
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 30),
    signed=st.booleans(),
    zero_rows=st.integers(0, 5),
    largest=st.sampled_from([1e-6, 1.0, 40.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_bound_is_never_below_the_largest_eigenvalue(
    seed: int, size: int, signed: bool, zero_rows: int, largest: float, dtype: torch.dtype
) -> None:
    """From the first call on, at every warm start, for any start vector, and with M changing under it."""
    generator = torch.Generator().manual_seed(seed)
    lateral = random_lateral(size, seed, condition=1e3, largest=largest, signed=signed)
    lateral[:zero_rows] = 0.0
    lateral[:, :zero_rows] = 0.0
    lateral = lateral.to(dtype)
    perron = torch.rand(size, generator=generator, dtype=torch.float64).clamp(min=1e-6).to(dtype)
    for _ in range(6):
        bound = certify(lateral, perron, Rows.all(size), ridge=0)
        # no tolerance: the bound is inflated for the rounding of its own product, in float32 too. What is left is
        # the rounding of the eigenvalue itself, in float64.
        assert bound.value >= largest_eigenvalue(lateral) * (1 - 1e-13)
        assert (bound.perron > 0).all()
        perron = bound.perron
        step = random_lateral(size, seed + 1, largest=largest).to(dtype)
        lateral = lateral + 0.1 * (step - lateral)


def test_bound_is_exact_where_rounding_is_all_there_is() -> None:
    """All row sums alike: v = 1 is the Perron vector, and λmax = 0.5 + 0.1 · 33 in exact arithmetic."""
    lateral = torch.full((33, 33), 0.1) + 0.5 * torch.eye(33)
    bound = certify(lateral, torch.ones(33), Rows.all(33), ridge=0)
    assert largest_eigenvalue(lateral) <= bound.value <= 3.8 * (1 + 1e-4)


@MATRICES
@given(seed=st.integers(0, 10_000), size=st.integers(2, 40), zero_rows=st.integers(0, 1))
def test_bound_is_tight_after_a_warm_start(seed: int, size: int, zero_rows: int) -> None:
    """Within 5 %, zero rows included, while M still moves: a loose bound costs iterations."""
    lateral, goal = random_lateral(size, seed, largest=3.0), random_lateral(size, seed + 1, largest=5.0)
    for matrix in (lateral, goal):
        matrix[:zero_rows] = 0.0
        matrix[:, :zero_rows] = 0.0
    perron = certify_afresh(lateral, Rows.all(size), ridge=0).perron
    for update in range(20):
        lateral = lateral + 0.1 * (goal - lateral)
        bound = certify(lateral, perron, Rows.all(size), ridge=0)
        perron = bound.perron
        # two unrelated matrices: from the tenth update on, each moves M by less than 4 % of their difference
        assert update < 10 or bound.value <= 1.05 * largest_eigenvalue(lateral)


def test_bound_stays_useful_throughout_training(digits: Dataset) -> None:
    """Real updates, of 20 images each, in which channels fall silent and wake: never a multiple of λmax."""
    images = to_unit(digits.train_images[:600])
    layer = SimilarityMatchingConv2d(1, 20, 4)
    for start in range(0, 600, 20):
        layer.partial_fit(images[start : start + 20])
        top = largest_eigenvalue(layer.lateral)
        # float32 rows of M are symmetric to rounding only, hence the 1e-5
        assert top * (1 - 1e-5) <= layer.bound.value <= top * 1.5


def test_bound_stays_useful_when_a_silent_channel_wakes() -> None:
    """A channel silent for 60 updates (its Perron entry decays to the floor) that is active in the next batch."""
    lateral = random_lateral(8, 6, largest=3.0)
    active = lateral.clone()
    active[2] = active[:, 2] = 0.0
    silent = active.clone()
    silent[2, 2] = 0.8**60
    perron = torch.ones(8, dtype=torch.float64)
    for _ in range(60):
        perron = certify(silent, perron, Rows.all(8), ridge=0).perron
    awake = silent + 0.2 * (lateral - silent)
    perron, _ = warm_up(awake, perron, Rows.all(8), flagged=torch.zeros(8))  # as an update does
    assert certify(awake, perron, Rows.all(8), ridge=0).value <= 1.5 * largest_eigenvalue(awake)


def test_bound_survives_a_revival() -> None:
    """A revived channel is a lone 1 on the diagonal: the old Perron vector has nothing there, the bound must hold."""
    lateral = random_lateral(8, 5, largest=0.3)
    lateral[2] = lateral[:, 2] = 0.0
    perron = certify_afresh(lateral, Rows.all(8), ridge=0).perron
    lateral[2, 2] = 1.0  # now the largest eigenvalue
    for _ in range(30):
        bound = certify(lateral, perron, Rows.all(8), ridge=0)
        assert bound.value >= 1.0
        perron = bound.perron
    assert certify_afresh(lateral, Rows.all(8), ridge=0).value <= 1.05


def test_ridge_and_flags_are_reported() -> None:
    lateral = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    flagged = torch.tensor([False, True, False])
    bound = certify_afresh(lateral, Rows.all(3), ridge=0.5)
    assert bound.ridge == pytest.approx(1.5, rel=1e-15)  # half the mean of the diagonal
    assert bound.value == pytest.approx(7.5, rel=1e-2)
    assert bound.value >= 7.5
    assert torch.equal(warm_up(lateral, torch.ones(3).double(), Rows.all(3), flagged=flagged)[1], flagged)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_non_finite_weights_are_refused(bad: float, place: tuple[int, int]) -> None:
    lateral = torch.eye(5)
    lateral[place] = bad
    with pytest.raises(SharedFault, match="non-finite lateral weights on rank 0"):
        certify(lateral, torch.ones(5), Rows.all(5), ridge=0)
    with pytest.raises(SharedFault, match="non-finite lateral weights on rank 0"):
        warm_up(lateral, torch.ones(5), Rows.all(5), flagged=torch.zeros(5))


# -- several owners: the bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_owners_agree_on_the_bound(world_size: int) -> None:
    lateral = random_lateral(10, 7, largest=3.0)
    flagged = (torch.arange(10) % 4 == 1).double()
    start, _ = warm_up(lateral, torch.ones(10).double(), Rows.all(10), flagged=flagged)
    single = certify(lateral, start, Rows.all(10), ridge=0.1)
    parts = split_rows(10, world_size)

    def owner(exchange: ThreadExchange) -> Any:
        rows = parts[exchange.rank]
        own = slice(rows.start, rows.stop)
        perron = torch.ones(10).double()
        perron, flags = warm_up(lateral[own], perron, rows, flagged=flagged[own], mesh=Mesh.of_owners(exchange))
        return certify(lateral[own], perron, rows, ridge=0.1, mesh=Mesh.of_owners(exchange)), flags

    for bound, flags in results(run_owners(world_size, owner)):
        # a matrix–vector product by blocks of rows: rounding of 10 terms
        assert bound.value == pytest.approx(single.value, rel=1e-14)
        assert bound.ridge == pytest.approx(single.ridge, rel=1e-14)
        torch.testing.assert_close(bound.perron, single.perron, rtol=1e-14, atol=0)
        assert torch.equal(flags, flagged > 0)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["nan", "exception"])
def test_every_owner_raises_a_fault_met_while_bounding(world_size: int, kind: str) -> None:
    lateral = random_lateral(10, 7, largest=3.0)
    guilty = world_size - 1
    parts = split_rows(10, world_size)
    cause = ValueError("mine")

    def owner(exchange: ThreadExchange) -> Any:
        own = lateral[parts[exchange.rank].start : parts[exchange.rank].stop].clone()
        fault = None
        if exchange.rank == guilty and kind == "nan":
            own[0, 3] = torch.nan
        elif exchange.rank == guilty:
            fault = cause
        perron = torch.ones(10).double()
        mesh, held_fault = Mesh.of_owners(exchange), held(fault, exchange)
        return certify(own, perron, parts[exchange.rank], ridge=0, mesh=mesh, fault=held_fault)

    outcomes = run_owners(world_size, owner)
    assert [type(outcome) for outcome in outcomes] == [SharedFault] * world_size
    assert [outcome.ranks for outcome in outcomes] == [[guilty]] * world_size
    assert [outcome.__cause__ for outcome in outcomes] == [
        cause if kind == "exception" and rank == guilty else None for rank in range(world_size)
    ]


# -- several owners: the dynamics --------------------------------------------------------------------------------------

SIZE, COLUMNS = 10, 45
# enough to meet the tolerance, so that an early stop is one
ITERATIONS = {("accelerated", 0.0): 60, ("accelerated", 1e-2): 200, ("accelerated", 1e-6): 600} | {
    ("projected_gradient", 0.0): 60,
    ("projected_gradient", 1e-2): 600,
}


def sharded_solve(
    world_size: int,
    config: DynamicsConfig,
    *,
    asynchronous: bool = False,
    delays_s: dict[int, float] | None = None,
    spoil: Callable[[int, Tensor, Tensor], Exception | None] = lambda rank, columns, lateral: None,
) -> list[Any]:
    """(solution, exchanges) of every owner on one problem; `spoil` may damage an owner's own rows."""
    lateral = random_lateral(SIZE, 91, condition=1e3, largest=4.0)
    columns = random_drive(SIZE, COLUMNS, 92)
    bound = certify_afresh(lateral, Rows.all(SIZE), ridge=config.ridge)
    parts = split_rows(SIZE, world_size)

    def owner(exchange: ThreadExchange) -> tuple[Solution, int]:
        rows = parts[exchange.rank]
        own_columns, own_lateral = columns[rows.start : rows.stop].clone(), lateral[rows.start : rows.stop].clone()
        fault = spoil(exchange.rank, own_columns, own_lateral)
        solution = Dynamics(config, rows, exchange).solve(own_columns, own_lateral, bound, fault=held(fault, exchange))
        return solution, exchange.num_exchanges

    return run_owners(world_size, owner, asynchronous=asynchronous, delays_s=delays_s)


@ASYNCHRONOUS
@pytest.mark.parametrize(("solver", "tolerance"), ITERATIONS)
def test_owners_reach_the_result_of_a_single_one(solver: str, tolerance: float, asynchronous: bool) -> None:
    """10 channels over 1, 2 and 3 owners, tiles in turn: fixed iterations and early stop."""
    config = DynamicsConfig(
        solver=solver, tolerance=tolerance, max_iterations=ITERATIONS[solver, tolerance], tile_columns=16
    )
    single, _ = results(sharded_solve(1, config))[0]
    assert (single.num_iters < config.max_iterations) == (tolerance > 0)
    for world_size in (2, 3):
        outcomes = results(sharded_solve(world_size, config, asynchronous=asynchronous))
        for solution, _ in outcomes:
            assert solution.num_iters == single.num_iters
            # float64 rounding of a GEMM whose K terms are summed in blocks, over hundreds of iterations; values near 1
            torch.testing.assert_close(solution.y, single.y, rtol=0, atol=1e-12)
            torch.testing.assert_close(solution.residual, single.residual, rtol=0, atol=1e-12)
            assert torch.equal(solution.y, outcomes[0][0].y)  # the owners among themselves: the same bytes


@pytest.mark.parametrize("world_size", [2, 3])
def test_owners_report_the_residual_of_what_they_return(world_size: int) -> None:
    """Few iterations on an M of uneven diagonal: each owner's part needs its own M_ii and its own gradient."""
    uneven = torch.linspace(0.2, 3.0, SIZE, dtype=torch.float64)
    lateral = random_lateral(SIZE, 93, largest=4.0) * torch.outer(uneven, uneven)
    columns = random_drive(SIZE, COLUMNS, 94)
    bound = certify_afresh(lateral, Rows.all(SIZE), ridge=0)
    parts = split_rows(SIZE, world_size)
    for iterations in (2, 5, 9):
        config = DynamicsConfig(tolerance=0, max_iterations=iterations, ridge=0)

        def owner(exchange: ThreadExchange, config: DynamicsConfig = config) -> Solution:
            rows = parts[exchange.rank]
            own = slice(rows.start, rows.stop)
            return Dynamics(config, rows, exchange).solve(columns[own], lateral[own], bound)

        for solution in results(run_owners(world_size, owner)):
            expected = relative_residual(columns, lateral, solution.y)
            # the solver forms it as (y − w)/s: rounding of order K · eps · λmax y relative to the drive
            torch.testing.assert_close(solution.residual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_exchange_per_iteration(world_size: int) -> None:
    """Every iterate is gathered once, and one more small gather sends the residual of the last."""
    config = DynamicsConfig(tolerance=0, max_iterations=23, tile_columns=16)
    tiles = -(-COLUMNS // config.tile_columns)
    for _, num_exchanges in results(sharded_solve(world_size, config)):
        assert num_exchanges == tiles * (23 + 1)


@ASYNCHRONOUS
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_owner_changes_nothing(slow: int, asynchronous: bool) -> None:
    config = DynamicsConfig(tolerance=1e-3, max_iterations=60, tile_columns=16)
    expected = results(sharded_solve(2, config))
    delayed = results(sharded_solve(2, config, asynchronous=asynchronous, delays_s={slow: 0.002}))
    for (solution, num_exchanges), (wanted, wanted_exchanges) in zip(delayed, expected, strict=True):
        assert torch.equal(solution.y, wanted.y)
        assert torch.equal(solution.residual, wanted.residual)
        assert (solution.num_iters, num_exchanges) == (wanted.num_iters, wanted_exchanges)


@ASYNCHRONOUS
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("kind", ["drive", "last tile", "infinite drive", "lateral", "exception"])
def test_every_owner_raises_a_fault_and_names_the_guilty(
    kind: str, guilty: int, world_size: int, asynchronous: bool
) -> None:
    cause = ValueError("mine")

    def spoil(rank: int, columns: Tensor, lateral: Tensor) -> Exception | None:
        if rank != guilty:
            return None
        if kind == "drive":
            columns[1, 3] = torch.nan
        elif kind == "last tile":
            columns[1, -1] = torch.nan
        elif kind == "infinite drive":
            columns[0, 3] = -torch.inf
        elif kind == "lateral":
            lateral[1, 2] = torch.nan
        else:
            return cause
        return None

    config = DynamicsConfig(tolerance=1e-3, tile_columns=16)
    outcomes = sharded_solve(world_size, config, asynchronous=asynchronous, spoil=spoil)
    assert [type(outcome) for outcome in outcomes] == [SharedFault] * world_size
    assert [outcome.ranks for outcome in outcomes] == [[guilty]] * world_size
    kinds = {outcome.kind for outcome in outcomes}
    assert kinds == {"exception" if kind == "exception" else "non-finite values in the drive or the lateral weights"}
    assert (outcomes[guilty].__cause__ is cause) == (kind == "exception")


def test_overflow_on_the_way_is_raised_by_all() -> None:
    """Step 1e200 on finite input: y jumps between s·d and 0, and from every odd iterate the gradient step overflows."""
    config = DynamicsConfig(solver="projected_gradient", step=1e200, tolerance=1e-3, check_every=5)
    outcomes = sharded_solve(2, config)
    assert [type(outcome) for outcome in outcomes] == [SharedFault] * 2
    assert outcomes[0].kind == "non-finite activities"
    assert outcomes[0].ranks == outcomes[1].ranks == [0, 1]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "parts", "counts"), [(10, 3, [4, 3, 3]), (4, 4, [1] * 4), (7, 2, [4, 3]), (5, 1, [5])]
)
def test_rows_are_contiguous_and_even(total: int, parts: int, counts: list[int]) -> None:
    parts_of_rows = split_rows(total, parts)
    assert [rows.count for rows in parts_of_rows] == counts
    assert [channel for rows in parts_of_rows for channel in range(rows.start, rows.stop)] == list(range(total))
    assert {rows.padded for rows in parts_of_rows} == {max(counts)}


@pytest.mark.parametrize("parts", [0, -1, 5])
def test_more_owners_than_channels_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"expected between 1 and 4 shards for 4 channels, got {parts}"):
        split_rows(4, parts)
